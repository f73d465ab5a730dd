"""What carries a rank's puts to ranks of other hosts, and lands theirs here, by MPI messages.

A put is its rows, straight from this rank's stage, and then a *letter*, which says where they belong and which signal
follows them: they are received into their place in the other's segment. Rows go in pieces, so that a long transfer
shows that it moves; puts that are posted together share a letter. A signal is released when the rows of all earlier
puts from the same rank are here, too.

Why rows come first: libfabric keeps a message that nobody has asked for, and forgets it if its sender dies in the
middle of it; one that was asked for is an error then, upon which MPI ends the receiver. With the letter they are here
as a whole. But it keeps so many of a rank (FI_TCP_MAX_SAVED), and reads no further: `most_messages`.

Nothing here waits. A rank that gives up says why before its abort, and in any case each rank tells its *news* now and
then (kernel/carried.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from reference.arrays import Array

from ..device.compilation import compile_for
from ..kernel import carried
from ..kernel.control import ABORT
from ..kernel.wire import FLAG_AT, NO_FLAG, PEER, PUT_WORDS, SOURCE_AT, WORD
from ..processes.send_limit import SendLimit
from .messages import Inbox, Outbox

LETTER, NEWS, GOODBYE, ROWS = range(4)  # tags
WORD_BYTES = 8
MOST_PUTS = 64  # that are taken at a time
PIECE_BYTES = 2**20
MOST_PIECES = 24  # of a letter
OTHERS = 8  # news, goodbyes, and what ranks say to each other outside of calls


class Piece(NamedTuple):
    """Of a put's rows, and the signal that follows it. A letter has all but the first field."""

    source_at: int
    target_at: int
    num_bytes: int
    flag_at: int
    word: int


def pieces(puts: Array) -> Iterator[Piece]:
    """What puts are sent in: each signal goes with the last piece of its rows."""
    for source_at, target_at, num_bytes, flag_at, word in puts[:, SOURCE_AT : WORD + 1].tolist():
        first = 0
        while num_bytes - first > PIECE_BYTES:
            yield Piece(source_at + first, target_at + first, PIECE_BYTES, NO_FLAG, 0)
            first += PIECE_BYTES
        yield Piece(source_at + first, target_at + first, num_bytes - first, flag_at, word)


def most_messages(num_puts: int, num_bytes: int) -> int:
    """That so many puts to one peer with so many bytes of rows are at most, and what else is under way then.

    Each put may come alone, with a letter of its own; and the peer's process may stand still meanwhile.
    """
    num_pieces = num_puts + num_bytes // PIECE_BYTES
    return num_pieces + num_puts + num_pieces // MOST_PIECES + OTHERS


class Carrier:
    """Of one rank.

    Args:
        letters, rows: communicators of all ranks that nobody else uses.
        rank_idx: the rank's.
        segments: every rank's as bytes; those of ranks on other hosts are images, of which the control words count.
        others: ranks on other hosts.
        control_at: where control words begin in a segment, in bytes.
        wire: the rank's ring of puts.
    """

    def __init__(
        self,
        letters: Any,
        rows: Any,
        rank_idx: int,
        segments: Sequence[Array],
        others: Sequence[int],
        control_at: int,
        wire: Array,
    ) -> None:
        from mpi4py import MPI

        self._MPI, self._status, self._letters, self._rows = MPI, MPI.Status(), letters, rows
        self._own, self._words = segments[rank_idx], segments[rank_idx].view(np.int64)
        self._controls = [segment[control_at:].view(np.int64) for segment in segments]
        self._control, self._control_at = self._controls[rank_idx], control_at // WORD_BYTES
        self._wire, self._taken, self._puts = wire, 0, np.zeros(MOST_PUTS * PUT_WORDS, np.int64)
        limit = SendLimit()
        self._outboxes = {other: Outbox(other, limit) for other in others}
        self._inboxes = {other: Inbox() for other in others}
        self.staying = set(others)  # ranks that have not said goodbye
        self.beat_s = 1.0  # from news to news
        self._told = 0.0
        news = np.zeros(carried.NEWS_WORDS, np.int64)
        self._take: Callable[..., int] = compile_for(carried.take_puts, (wire, 0, self._puts))
        self._land: Callable[..., None] = compile_for(carried.land, (self._words, 0, 0, 0))
        self._read_news: Callable[..., None] = compile_for(carried.read_news, (self._control, news))
        self._write_news: Callable[..., None] = compile_for(carried.write_news, (self._control, news))

    def step(self) -> bool:
        """Do what can be done now; returns whether anything has moved."""
        moved = self._read_letters()  # first: so MPI learns of a peer that is gone before anything is sent there
        for inbox in self._inboxes.values():
            moved |= inbox.land(self._land_signal)
        if time.monotonic() - self._told > self.beat_s:
            self._tell_news()
        return moved | self.send_puts()

    @property
    def has_words(self) -> bool:
        """Is there anything that has not left?"""
        return any(self._outboxes.values()) or self._taken < int(self._wire[0])

    @property
    def is_busy(self) -> bool:
        """Is anything under way, from here or to here, as far as is known?"""
        return self.has_words or any(self._inboxes.values())

    @property
    def is_given_up(self) -> bool:
        return bool(self._control[ABORT] != 0)

    def send_puts(self) -> bool:
        """Take all puts that are in the ring, and send what can be sent."""
        moved = False
        while (count := self._take(self._wire, self._taken, self._puts)) > 0:
            self._taken += count
            puts = self._puts.reshape(-1, PUT_WORDS)[:count]
            for other in np.unique(puts[:, PEER]).tolist():
                self._send(self._outboxes[other], puts[puts[:, PEER] == other])
            moved = True
        for outbox in self._outboxes.values():
            moved |= outbox.push()
        return moved

    def _send(self, outbox: Outbox, puts: Array) -> None:
        if (puts[:, FLAG_AT] == WORD_BYTES * (self._control_at + ABORT)).any():
            outbox.post(self._letters, self._news(), NEWS)
        letter: list[tuple[int, ...]] = []
        for piece in pieces(puts):
            if piece.num_bytes:
                outbox.post(self._rows, self._own[piece.source_at : piece.source_at + piece.num_bytes], ROWS)
            letter.append(piece[1:])
            if len(letter) == MOST_PIECES:
                outbox.post(self._letters, np.array(letter, np.int64), LETTER)
                letter = []
        if letter:
            outbox.post(self._letters, np.array(letter, np.int64), LETTER)

    def _tell_news(self) -> None:
        """Where there is room: who is gone gets no more of it, and whose rows keep MPI busy sees by them."""
        self._told = time.monotonic()
        news = self._news()
        for outbox in self._outboxes.values():
            if not outbox.is_stuck:
                outbox.post(self._letters, news, NEWS)

    def _news(self) -> Array:
        news = np.empty(carried.NEWS_WORDS, np.int64)
        self._read_news(self._control, news)
        return news

    def say_goodbye(self) -> None:
        """There will be no letters behind this one."""
        for outbox in self._outboxes.values():
            outbox.post(self._letters, np.empty(0, np.int64), GOODBYE)

    def _read_letters(self) -> bool:
        moved, status = False, self._status
        while (message := self._letters.Improbe(self._MPI.ANY_SOURCE, self._MPI.ANY_TAG, status)) is not None:
            words = np.empty(status.Get_count(self._MPI.BYTE) // WORD_BYTES, np.int64)
            source, tag = status.Get_source(), status.Get_tag()
            message.Recv(words)
            if tag == LETTER:
                self._read_letter(source, words)
            elif tag == NEWS:
                self._write_news(self._controls[source], words)
            else:
                self.staying.discard(source)
            moved = True
        return moved

    def _read_letter(self, source: int, words: Array) -> None:
        inbox = self._inboxes[source]
        for target_at, num_bytes, flag_at, word in words.reshape(-1, len(Piece._fields) - 1).tolist():
            flag, request = flag_at // WORD_BYTES, None  # the flag of NO_FLAG is below 0, too
            if flag == self._control_at + ABORT:
                self._land_signal(flag, word)  # whatever else is under way
                continue
            if num_bytes:
                room = self._own[target_at : target_at + num_bytes]
                request = self._rows.Irecv(room, source, ROWS)
            inbox.expect(request, flag, word)

    def _land_signal(self, flag: int, word: int) -> None:
        self._land(self._words, flag, word, self._control_at)
