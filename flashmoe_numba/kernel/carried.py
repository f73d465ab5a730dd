"""What a carrier does to a rank's memory: takes its puts out of the ring, lands those of ranks on other hosts.

Compiled, these are entries of their own, which Python calls between messages (heap/carrier.py).

What other hosts are to know of a rank are its *news*: its abort record, its progress and its silence. Each rank of
another host has an image of these words.
"""

from __future__ import annotations

from flashmoe_numba.device import cas, fetch_add, jit, ld_acquire, ld_relaxed, st_release

from .control import ABORT, PROGRESS, RECORD, RECORD_FIELDS, SILENT
from .wire import PUT_WORDS, STAMP, place_at

FIELDS = RECORD_FIELDS.stop - RECORD_FIELDS.start
NEWS_WORDS = 1 + FIELDS + 2  # RECORD, its fields, PROGRESS, SILENT


@jit(entry=True)
def take_puts(wire, taken, puts):
    """Copy puts from number `taken` on out of the ring, those that are there and fit; returns how many.

    Args:
        puts: int64 `[most, PUT_WORDS]`.
    """
    count = 0
    while count < puts.size // PUT_WORDS:
        at = place_at(wire, taken + count)
        if ld_acquire(wire, at + STAMP) != taken + count + 1:
            break
        for i in range(PUT_WORDS):
            puts[count * PUT_WORDS + i] = wire[at + i]
        count += 1
    return count


@jit(entry=True)
def land(words, flag, word, control):
    """Rows are here: release the signal that comes with them, if any. That they came is progress.

    Args:
        words: the rank's segment.
        flag: the signal's word in it, or below 0. The abort word is claimed: who is named there stays so.
        control: where its control words begin.
    """
    if flag == control + ABORT:
        cas(words, flag, 0, word)
    elif flag >= 0:
        st_release(words, flag, word)
    fetch_add(words, control + PROGRESS, 1)


@jit(entry=True)
def read_news(control, news):
    """The rank's own; a record that is complete in them is so with all its fields."""
    news[0] = ld_acquire(control, RECORD)
    for i in range(FIELDS):
        news[1 + i] = control[RECORD + 1 + i]
    news[1 + FIELDS] = ld_relaxed(control, PROGRESS)
    news[2 + FIELDS] = ld_relaxed(control, SILENT)


@jit(entry=True)
def write_news(image, news):
    """Of another rank into its image here, the record's fields before what says that it is complete."""
    for i in range(FIELDS):
        image[RECORD + 1 + i] = news[1 + i]
    st_release(image, PROGRESS, news[1 + FIELDS])
    st_release(image, SILENT, news[2 + FIELDS])
    st_release(image, RECORD, news[0])
