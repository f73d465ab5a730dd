"""Tile GEMMs: the verbs that multiply, and weights in the forms in which targets read them."""

from .forms import Form, linear_form, make_form
from .gradients import GRADIENT_COLUMNS, GRADIENT_ROWS, hidden_gradient, weight_gradient
from .matrices import Matrices, as_matrices
from .panels import Panels, pack_matrices, unpack_matrices
from .rows import IN_ORDER, KEPT, LOCAL, PLACE_WORDS, RANK, ROW_IN, ROW_OUT, Rooms, Rows, Runs, nothing_kept, word_of
from .stub import Scratch, tile_gemm

__all__ = [
    "GRADIENT_COLUMNS",
    "GRADIENT_ROWS",
    "IN_ORDER",
    "KEPT",
    "LOCAL",
    "PLACE_WORDS",
    "RANK",
    "ROW_IN",
    "ROW_OUT",
    "Form",
    "Matrices",
    "Panels",
    "Rooms",
    "Rows",
    "Runs",
    "Scratch",
    "as_matrices",
    "hidden_gradient",
    "linear_form",
    "make_form",
    "nothing_kept",
    "pack_matrices",
    "tile_gemm",
    "unpack_matrices",
    "weight_gradient",
    "word_of",
]
