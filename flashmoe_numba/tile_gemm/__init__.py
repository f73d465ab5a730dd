"""Tile GEMMs: the verb that multiplies one tile, and weights in the forms in which targets read them."""

from .forms import Form, linear_form, make_form
from .matrices import Matrices, as_matrices
from .panels import Panels, pack_matrices, unpack_matrices
from .rows import IN_ORDER, PLACE_WORDS, RANK, ROW_IN, ROW_OUT, Rooms, Rows
from .stub import Scratch, tile_gemm

__all__ = [
    "IN_ORDER",
    "PLACE_WORDS",
    "RANK",
    "ROW_IN",
    "ROW_OUT",
    "Form",
    "Matrices",
    "Panels",
    "Rooms",
    "Rows",
    "Scratch",
    "as_matrices",
    "linear_form",
    "make_form",
    "pack_matrices",
    "tile_gemm",
    "unpack_matrices",
]
