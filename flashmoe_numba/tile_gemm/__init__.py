"""Tile GEMMs: the verb that multiplies one tile, and weights in the form in which it reads them."""

from .panels import Panels, pack_matrices
from .stub import IDENTITY, Scratch, tile_gemm

__all__ = ["IDENTITY", "Panels", "Scratch", "pack_matrices", "tile_gemm"]
