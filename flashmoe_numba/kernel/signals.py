"""Signal words.

A signal is one 8-byte word on its reader: `(epoch << 32) | (call << 24) | number of rows`. Nothing is cleared between
calls: a word of the current epoch means "arrived in this call". `call` says of a packet what kind of call sent it, so
that ranks whose calls differ notice: 0 for a forward, else the backward of the forward that it names.
"""

from __future__ import annotations

from flashmoe_numba.device import jit

EPOCH_SHIFT = 32
CALL_SHIFT = 24
ROWS_MASK = (1 << CALL_SHIFT) - 1
LAST_CALL = (1 << EPOCH_SHIFT - CALL_SHIFT) - 1


def backward_of(epoch: int) -> int:
    """`call` of the backward of the forward that was this epoch: forwards that follow each other have other ones."""
    return 1 + epoch % LAST_CALL


def forward_of(call: int, epoch: int) -> int:
    """The last epoch before this one whose backward `call` can be."""
    return epoch - 1 - (epoch - 1 - (call - 1)) % LAST_CALL


@jit
def signal_word(epoch, call, num_rows):
    return (epoch << EPOCH_SHIFT) | (call << CALL_SHIFT) | int(num_rows)


@jit
def word_epoch(word):
    return word >> EPOCH_SHIFT


def call_in(word: int) -> int:
    """What kind of call a packet's word tells of."""
    return word >> CALL_SHIFT & LAST_CALL


word_call = jit(call_in)


@jit
def word_rows(word):
    return word & ROWS_MASK


@jit
def packet_flag(p, packet):
    """Index of a packet's flag. Odd and even calls have their own: who replaces a word, two calls on, knows by then
    that it was seen. So none is lost, in whatever order signals come.
    """
    return 2 * packet + (p.epoch & 1)


@jit
def last_packet_flag(p, packet):
    """The same of the call before."""
    return 2 * packet + 1 - (p.epoch & 1)
