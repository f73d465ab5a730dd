"""Tile GEMMs: weights in packed panels, and the verb that multiplies one tile."""

from .stub import Scratch, tile_gemm

__all__ = ["Scratch", "tile_gemm"]
