"""Rows one after the other, for the tile GEMM: none has a place of its own, so any words do for places."""

from __future__ import annotations

from flashmoe_numba.device import jit
from flashmoe_numba.tile_gemm import IN_ORDER, Rooms, Rows
from flashmoe_numba.tile_gemm import rows as of_rows

nothing_kept = jit(of_rows.nothing_kept, inline=True)


@jit
def rows_in_order(array, first, words):
    """Rows from row `first` of the array on."""
    return Rows(array, first, words, IN_ORDER)


@jit
def rooms_in_order(array, first, words):
    """The same, to be filled; no address is looked up."""
    return Rooms(array, first, words, IN_ORDER, words, 0)
