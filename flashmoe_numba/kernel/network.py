"""A network between hosts that are only pretended: interpreted, an actor among the blocks (device/fibers.py).

A *channel* carries one rank's puts to one peer, as any network may that keeps the promise of wire.py. It takes them out
of the ring late, and knows nothing of other channels. It reads rows when it lands them, not before; it lands them in
pieces, and those of later puts among those of earlier ones. A signal comes after all rows of its put, and of puts
without a signal before it; else signals overtake each other, also those of several calls. Now and then a channel pushes
its rank's control words into the peer's image of them, and always before it tells the peer that the rank gave up.

Nothing here is compiled: between processes puts are carried by heap/.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flashmoe_numba.device import array_at, cas, copy_row, ld_acquire, ld_relaxed, now, pause, st_release

from .control import COMPLETE, PROGRESS, RECORD, RECORD_FIELDS, SILENT
from .peers import of_peer
from .wire import NO_FLAG, PEER, STAMP, WORD, Put, place_at

PIECE = 4  # elements that land together
WINDOW = 3  # puts whose rows land in turns
TAKES_MORE = 0.5  # how often a put is taken while others are under way
MOST_LATE = 80  # steps of a put before its rows are looked at, and before its signal; most have a few
PUSHES_PER_DEADLINE = 32


class Flight:
    """A put under way.

    Attributes:
        late: steps that it still takes before its rows are looked at or, behind these, before its signal.
        landed: bytes of its rows.
    """

    def __init__(self, put: Put, late: int, lag: int) -> None:
        self.put, self.late, self.landed, self._lag = put, late, 0, lag

    @property
    def has_landed(self) -> bool:
        """Is nothing left to do but its signal?"""
        return self.late == 0 and self.landed == self.put.num_bytes

    def land(self, num_bytes: int) -> None:
        self.landed += num_bytes
        if self.landed == self.put.num_bytes:
            self.late = self._lag


class Channel:
    """From one rank to one peer.

    Args:
        source, target: what has their `problem` and `segments`: arguments of their blocks.
        taken: puts of the source that nobody needs to look at any more.
        draw: numbers in [0, 1), by which puts and their rows overtake each other; None: none does.
    """

    def __init__(self, source: Any, target: Any, taken: int, draw: Callable[[], float] | None) -> None:
        self.problem, self.source, self.target = source.problem, source.segments, target.segments
        self.peer: int = target.problem.rank_idx
        self.taken, self._draw = taken, draw
        self._flights: list[Flight] = []
        self._pushed = {PROGRESS: 0, SILENT: 0, RECORD: 0}
        self._last_push = 0

    def carry(self, is_over: Callable[[], bool]) -> None:
        """Carry puts until all are where they belong, and no more will come."""
        attempt = 0
        while True:
            over = is_over()  # before the ring is looked at
            taken, flight = self.take(), self.next()
            if flight is not None:
                self.move(flight)
            pushed = self.beat()
            if taken is not None or flight is not None or pushed:
                attempt = 0
            elif over:
                return
            else:
                attempt = pause(attempt)

    def take(self) -> Flight | None:
        """The next put of the ring, if one is there; those to others, which take it themselves, are passed over."""
        if self._flights and not (self._draw and self._draw() < TAKES_MORE):
            return None
        wire = self.source.wire
        at = place_at(wire, self.taken)
        while ld_acquire(wire, at + STAMP) == self.taken + 1:
            put = Put(*(int(wire[i]) for i in range(at + PEER, at + WORD + 1)))
            self.taken += 1
            if put.peer == self.peer:
                self._flights.append(Flight(put, self._lateness(), self._lateness()))
                return self._flights[-1]
            at = place_at(wire, self.taken)
        return None

    def _lateness(self) -> int:
        return int(self._draw() ** 3 * MOST_LATE) if self._draw else 0

    def next(self) -> Flight | None:
        """A put that can go on: any one whose rows are not there, or whose signal waits for no others."""
        able, others = [], False
        for flight in self._flights[:WINDOW]:
            if not (flight.has_landed and others):
                able.append(flight)
            others |= flight.put.flag_at == NO_FLAG
        if not able:
            return None
        return able[int(self._draw() * len(able)) if self._draw else 0]

    def move(self, flight: Flight) -> None:
        """One step of a put: nothing, while it is late, else a piece of its rows; when none is left, its signal."""
        if flight.late > 0:
            flight.late -= 1
            ld_relaxed(self.source.wire, 0)
        elif flight.has_landed:
            self._flights.remove(flight)
            self._signal(flight.put)
        else:
            self._land(flight)

    def _land(self, flight: Flight) -> None:
        put, at = flight.put, flight.landed
        rows, first = self._locate(self.source, put.source_at + at)
        room, room_first = self._locate(self.target, put.target_at + at)
        size = rows.dtype.itemsize
        elements = min(PIECE, (put.num_bytes - at) // size)
        copy_row(room, room_first, rows, first, elements)
        flight.land(elements * size)

    def _signal(self, put: Put) -> None:
        if put.flag_at == NO_FLAG:
            return
        words, i = self._locate(self.target, put.flag_at)
        if words is self.target.control:
            self.push()
            cas(words, i, 0, put.word)
        else:
            st_release(words, i, put.word)

    def _locate(self, segments: Any, at: int) -> tuple[Any, int]:
        """(array, index) of what lies at this byte of a rank's segment."""
        p = self.problem
        flags = (p.dispatch_flag_at, segments.dispatch_flag), (p.result_flag_at, segments.result_flag)
        regions = (p.dispatch_at, segments.dispatch), (p.result_at, segments.result), (p.again_at, segments.again)
        numbers = (p.factors_at, segments.factors), (p.dots_at, segments.dots), (p.control_at, segments.control)
        staged = p.stage_at <= at < p.dispatch_flag_at
        inside = at - p.stage_at if staged else at
        for first, own in (*flags, *regions, *numbers):
            size = own.dtype.itemsize
            if first <= inside < first + own.size * size:
                here = array_at(segments.room[self.peer] + first, own.size, own) if staged else own
                return here, (inside - first) // size
        raise IndexError(f"byte {at} of a segment is in no array")

    def beat(self) -> bool:
        """Push what is new, now and then; was there anything?"""
        time = now()
        if time - self._last_push < self.problem.deadline_ns // PUSHES_PER_DEADLINE:
            return False
        self._last_push = time
        return self.push()

    def push(self) -> bool:
        """Bring the peer's image of this rank's control words up to date; was it not?"""
        control, before = self.source.control, dict(self._pushed)
        image = of_peer(self.target, self.problem.rank_idx, self.problem.control_at, control)
        for word in (PROGRESS, SILENT):
            self._pushed[word] = ld_relaxed(control, word)
            if self._pushed[word] != before[word]:
                st_release(image, word, self._pushed[word])
        if before[RECORD] != COMPLETE and ld_acquire(control, RECORD) == COMPLETE:
            for word in range(RECORD_FIELDS.start, RECORD_FIELDS.stop):
                image[word] = control[word]
            st_release(image, RECORD, COMPLETE)
            self._pushed[RECORD] = COMPLETE
        return self._pushed != before
