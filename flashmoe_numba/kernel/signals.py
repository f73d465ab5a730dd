"""Signal words.

A signal is one 8-byte word on its reader: `(epoch << 32) | number of rows`. Nothing is cleared between calls: a word of
the current epoch means "arrived in this call".
"""

from __future__ import annotations

from flashmoe_numba.device import jit

EPOCH_SHIFT = 32
ROWS_MASK = (1 << EPOCH_SHIFT) - 1


@jit
def signal_word(epoch, num_rows):
    return (epoch << EPOCH_SHIFT) | int(num_rows)


@jit
def word_epoch(word):
    return word >> EPOCH_SHIFT


@jit
def word_rows(word):
    return word & ROWS_MASK
