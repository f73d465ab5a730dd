"""Memory that knows who touched which cell, in which order, and whether anything ordered it.

Every fiber has a vector clock. A release store, a fetch_add or a successful cas leaves the fiber's clock at the word;
an acquire load, a fetch_add or a cas that reads the word takes it over; a barrier gives all its lanes the same clock;
and a call's fibers begin with the clocks of all fibers of their rank's last call. Two accesses of one cell, not both
plain reads or both atomic, must be ordered by these clocks, in whatever order this run had them: so one run finds races
that other interleavings of the same synchronisation would show. Cells remember as in FastTrack (Flanagan and Freund,
"FastTrack: Efficient and Precise Dynamic Race Detection", PLDI 2009): the last write, and the reads since that nothing
orders among each other.

Loads of atomic words may be late (words.py says which stores they may read), or are sequentially consistent, as the run
wants. Plain loads are never late: it would show nothing. Take the first one of a run that could read anything but the
last store before it. That store does not happen before it, or coherence would hide all older ones; so the two race, and
are reported here whatever the load reads. Up to there the run is one of the memory model's. (This is the argument that
programs without data races need no weak plain memory: Adve and Hill, "Weak Ordering - A New Definition", ISCA 1990.)
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any

import numpy as np
from greenlet import getcurrent

from ...device.fibers import Block, Fiber, memory_view
from ...device.records import read_record, record_words
from .reports import Report, Site, Stopped, kernel_frame, place
from .words import MOST_LATE_POLLS, Message, Word

Access = tuple["Actor", int, CodeType | None, int]  # who, its clock then, and where, if places are noted
Meeting = tuple["Actor", CodeType, int]  # who came to a barrier, and where
# What listeners are told of atomic accesses; a swap that fails, "does not swap", is neither. Plain ones read and write.
LOADS, STORES = ("acquires", "reads"), ("releases", "adds to", "swaps")
NEVER = 1 << 62
_frame = sys._getframe
IS_VERB = True  # reports name the caller


class Actor:
    """One fiber in one call. `index` is its place in clocks, the same in every call of the run."""

    def __init__(self, memory: Memory, index: int, name: str, rank: int, epoch: int, clock: list[int]) -> None:
        self.memory, self.index, self.name, self.rank, self.epoch = memory, index, name, rank, epoch
        self.clock = clock
        self.tick()
        self.looked: dict[tuple[Region, int], int] = {}  # words it has loaded, and their values, since its last pause
        self.looked_before: dict[tuple[Region, int], int] = {}  # between its last two pauses
        self.pauses = 0
        self.poll = 0  # number of the poll that it is in: one begins after a pause, and whenever the time is taken
        self.time: int | None = None  # when it took the time last, where that is noted

    def tick(self) -> None:
        """Begin a new stretch: what comes now is not covered by what was given to others before."""
        self.clock = self.clock.copy()  # others may hold the old list
        self.clock[self.index] += 1
        self.now: Access | None = None if self.memory.with_places else (self, self.clock[self.index], None, 0)

    def join(self, clock: list[int]) -> None:
        """Know what whoever has this clock knows."""
        self.clock = list(map(max, self.clock, clock))

    def take_over(self, message: Message) -> None:
        """The clock that a store released, unless it is known: whoever knows the store's entry knows its clock."""
        _, writer, entry, clock, _ = message
        if entry > self.clock[writer]:
            self.join(clock)

    def wait_for_store(self, fiber: Fiber) -> None:
        """The fiber pauses: if it saw the newest, it would find nothing before one of these words is stored to."""
        self.looked_before, self.looked = self.looked, {}
        self.pauses += 1
        if self.looked_before and all(region.cells[i] == value for (region, i), value in self.looked_before.items()):
            fiber.polls_in_vain = True
            for region, i in self.looked_before:
                region.word(i).polled_by.add(fiber)

    def take_time(self, time: int) -> None:
        """It came round: a turn ends, and the next one begins."""
        if self.time is not None and time - self.time > self.memory.fair_turn:
            self.memory.last_long_turn = time
        self.time = time

    def comes_after(self, access: Access) -> bool:
        """Does the access happen before what this actor does now?"""
        return access[1] <= self.clock[access[0].index]


class Region:
    """One array: indexed by kernel code as the array itself, with every access checked.

    Args:
        name: for reports.
        array: one-dimensional; the memory itself.
        initialised: False if nothing may be read before it is written.
        num_writers: if not 0, the array has one part for each of that many ranks, who alone may write there, and each
            place once in a call.
        writer: with one part, the rank whose it is.
    """

    def __init__(
        self, memory: Memory, name: str, array: np.ndarray, initialised: bool, num_writers: int = 0, writer: int = 0
    ) -> None:
        self.memory, self.name, self.array, self.initialised = memory, name, array, initialised
        self.size, self.dtype = array.size, array.dtype
        self.cells: Any = array.data if array.dtype.kind in "iu" else array  # integers as Python's: much faster
        self.writer_cells, self.first_writer = array.size // num_writers if num_writers else 0, writer
        self.on_store: Callable[[int, int], None] | None = None  # is told every atomic store after it was made
        self.forget()

    def forget(self) -> None:
        """No access has been made yet."""
        self.writes: list[Access | None] = [None] * self.size
        self.reads: list[Access | dict[int, Access] | None] = [None] * self.size
        self.words: dict[int, Word] = {}  # cells with an atomic access since the last plain store

    # ---- plain accesses

    def __getitem__(self, i: Any) -> Any:
        if i.__class__ is slice:
            return self._read_slice(i)
        if not 0 <= i < self.size:
            self._out_of_bounds(i)
        access = getcurrent().actor.now or _placed()
        if self.writes[i] is not access and self.reads[i] is not access:  # else nothing is new
            self._read(i, access)
        return self.cells[i]

    def __setitem__(self, i: Any, value: Any) -> None:
        if not 0 <= i < self.size:
            self._out_of_bounds(i)
        access = getcurrent().actor.now or _placed()
        if self.writes[i] is not access or self.writer_cells:
            self._write(i, access)
        self.cells[i] = value

    def _read_slice(self, cells: slice) -> np.ndarray:
        start, stop = cells.start or 0, self.size if cells.stop is None else cells.stop
        if not 0 <= start <= stop <= self.size or cells.step is not None:
            self._out_of_bounds(stop)
        access = getcurrent().actor.now or _placed()
        for i in range(start, stop):
            if self.writes[i] is not access and self.reads[i] is not access:
                self._read(i, access)
        return self.array[start:stop]

    def _read(self, i: int, access: Access) -> None:
        if self.memory.plain_listener is not None:
            self.memory.plain_listener(access, "reads", self, i)
        actor, write = access[0], self.writes[i]
        if write is None:
            if not self.initialised:
                self._report("poison", i, access)
        elif write[0] is not actor and write[1] > actor.clock[write[0].index]:
            self._race(i, write, "write", access, "read")
        if i in self.words:
            self._check_against(i, self.words[i].writes, "atomic write", access, "read")
        read = self.reads[i]
        if read is None:
            self.reads[i] = access
        elif isinstance(read, dict):
            read[actor.index] = access
        elif read[0] is actor or actor.comes_after(read):
            self.reads[i] = access
        else:
            self.reads[i] = {read[0].index: read, actor.index: access}

    def _write(self, i: int, access: Access) -> None:
        if self.memory.plain_listener is not None:
            self.memory.plain_listener(access, "writes", self, i)
        actor, write, read = access[0], self.writes[i], self.reads[i]
        if write is not None and write[0] is not actor and write[1] > actor.clock[write[0].index]:
            self._race(i, write, "write", access, "write")
        if read is not None:
            if isinstance(read, dict):
                self._check_against(i, read, "read", access, "write")
            elif read[0] is not actor and not actor.comes_after(read):
                self._race(i, read, "read", access, "write")
            self.reads[i] = None
        if i in self.words:
            word = self.words.pop(i)
            self._check_against(i, word.writes, "atomic write", access, "write")
            self._check_against(i, word.reads, "atomic read", access, "write")
            word.wake()
        if self.writer_cells:
            self._check_layout(i, access, write)
        self.writes[i] = access

    # ---- atomic accesses: watched.py makes a step before and after them

    def load(self, i: int, acquire: bool) -> int:
        """What the word holds, or held before if the load is late; a relaxed load takes no clock over."""
        word, fiber = self.words.get(i) or self.word(i), getcurrent()  # here and below: a call less is worth it
        actor = fiber.actor
        self._record_read(i, word, actor.now or _placed())
        if word.messages:
            arrived = fiber.scheduler.switches - self.memory.arrives_within
            message = word.load(actor.index, actor.clock, self.memory.lateness(fiber), arrived)
            value = message[0]
            if acquire:
                actor.take_over(message)
        else:
            value = self.cells[i]
        actor.looked[self, i] = value
        if self.memory.listener is not None:
            self.memory.listener(actor, "acquires" if acquire else "reads", self, i, value)
        return value

    def release(self, i: int, value: int) -> None:
        """Store the value, and with it what this actor knows."""
        word, actor = self.words.get(i) or self.word(i), getcurrent().actor
        self._record_write(i, word, actor.now or _placed())
        self._store(i, word, actor, value)
        if self.memory.listener is not None:
            self.memory.listener(actor, "releases", self, i, value)

    def exchange(self, i: int, value: int, expected: int | None) -> int:
        """Add `value`, or store it if the word holds `expected`; returns what it held."""
        word, actor = self.words.get(i) or self.word(i), getcurrent().actor
        access = actor.now or _placed()
        old: int = self.cells[i]
        if word.messages:
            actor.take_over(word.messages[-1])
        actor.looked[self, i] = old
        if expected is None or old == expected:
            self._record_write(i, word, access)
            self._store(i, word, actor, old + value if expected is None else value)
        else:
            self._record_read(i, word, access)
        if self.memory.listener is not None:
            verb = "adds to" if expected is None else "swaps" if old == expected else "does not swap"
            self.memory.listener(actor, verb, self, i, self.cells[i])
        return old

    def word(self, i: int) -> Word:
        """The cell as a word, from its first atomic access on.

        Raises:
            Stopped: i is out of bounds, which is reported.
        """
        word = self.words.get(i)
        if word is None:
            if not 0 <= i < self.size:
                self._out_of_bounds(i)
            word = self.words[i] = Word()
        return word

    def _store(self, i: int, word: Word, actor: Actor, value: int) -> None:
        word.store(self.cells[i], value, actor.index, actor.clock, getcurrent().scheduler.switches)
        self.cells[i] = value
        actor.tick()
        if self.on_store is not None:
            self.on_store(i, value)

    def _record_read(self, i: int, word: Word, access: Access) -> None:
        """Check against plain accesses, and keep it for those to come."""
        actor, write = access[0], self.writes[i]
        if write is None:
            if not self.initialised and not word.writes:
                self._report("poison", i, access)
        elif write[1] > actor.clock[write[0].index]:
            self._race(i, write, "write", access, "atomic read")
        word.reads[actor.index] = access

    def _record_write(self, i: int, word: Word, access: Access) -> None:
        """The same."""
        actor, write, read = access[0], self.writes[i], self.reads[i]
        if write is not None and write[1] > actor.clock[write[0].index]:
            self._race(i, write, "write", access, "atomic write")
        if read is not None:
            reads = read if isinstance(read, dict) else {read[0].index: read}
            self._check_against(i, reads, "read", access, "atomic write")
        if self.writer_cells:
            before = max(word.writes.values(), key=lambda a: a[0].epoch, default=None)
            self._check_layout(i, access, before)
        word.writes[actor.index] = access

    # ---- reports

    def _check_against(self, i: int, accesses: dict[int, Access], one: str, access: Access, other: str) -> None:
        for before in accesses.values():
            if not access[0].comes_after(before):
                self._race(i, before, one, access, other)

    def _check_layout(self, i: int, access: Access, before: Access | None) -> None:
        owner = self.first_writer + i // self.writer_cells
        if owner != access[0].rank:
            self._report("conflict", i, access, f"written by rank {access[0].rank}, but it is rank {owner}'s to write:")
        if before is not None and before[0].epoch == access[0].epoch:
            twice = f"written twice in call {access[0].epoch}, before by {_who(before)}, now by"
            self._report("conflict", i, access, twice)

    def _race(self, i: int, first: Access, one: str, second: Access, other: str) -> None:
        text = f"{self.name}[{i}]: {one} by {_who(first)} and {other} by {_who(second)}"
        key = self.name, _where(first), _where(second)
        self.memory.add("race", text, key, (self.name, i), (_site(first), _site(second)))

    def _report(self, kind: str, i: int, access: Access, why: str = "read, but never written:") -> None:
        text, key = f"{self.name}[{i}]: {why} {_who(access)}", (self.name, _where(access), why[:20])
        self.memory.add(kind, text, key, (self.name, i), (_site(access),))

    def _out_of_bounds(self, i: Any) -> None:
        frame, actor = kernel_frame(_frame(2)), getcurrent().actor
        where = place(frame.f_code, frame.f_lasti)
        text = f"{self.name}[{i}] of {self.size} elements, by {actor.name} at {where}"
        self.memory.add("out of bounds", text, None, (self.name, i), (Site(actor.name, actor.epoch, where),))
        raise Stopped


class Parts:
    """An array of words whose parts are watched each by itself: it can be sliced, into these parts."""

    def __init__(self, memory: Memory, address: int, size: int) -> None:
        self._memory, self._address, self.size = memory, address, size

    def __getitem__(self, cells: slice) -> Region:
        return self._memory.at(self._address + 8 * cells.start, cells.stop - cells.start)


class Memory:
    """All regions of a run, and what was found in them.

    Args:
        num_actors: entries of a clock.
        arrives_within: every store is seen by everybody so many switches later.
        fair_turn: the last time is noted at which somebody came round after more switches than that.
    """

    MOST_REPORTS = 20

    def __init__(self, num_actors: int, arrives_within: int = NEVER, fair_turn: int = NEVER) -> None:
        self.num_actors, self.arrives_within, self.fair_turn = num_actors, arrives_within, fair_turn
        self.last_long_turn = 0
        self.with_places = True
        self._draw: Callable[[], float] | None = None
        self.reports: list[Report] = []
        self.listener: Callable[[Actor, str, Region, int, int], None] | None = None  # is told every atomic access
        self.plain_listener: Callable[[Access, str, Region, int], None] | None = None  # every plain one, before it
        self.meetings: dict[Block, list[Meeting]] = {}  # lanes that wait at barriers (watched.py)
        self._known: set[Any] = set()
        self._regions: dict[int, Region] = {}  # by address
        self.nothing = Region(self, "no array", np.empty(0, np.int64), initialised=False)  # where none is wanted

    def region(
        self, name: str, array: np.ndarray, *, initialised: bool = True, num_writers: int = 0, writer: int = 0
    ) -> Region:
        """Watch an array; it must stay where it is."""
        region = Region(self, name, array, initialised, num_writers, writer)
        if array.size:  # an empty one may lie where another begins
            self._regions[array.ctypes.data] = region
        return region

    def at(self, address: int, num_elements: int) -> Region:
        """The region that begins at an address."""
        region = self._regions.get(address)
        if num_elements == 0:
            return self.nothing
        if region is None or num_elements > region.size:
            frame = kernel_frame(_frame(1))
            what = "no array begins there" if region is None else f"{region.name} has {region.size} elements"
            where = place(frame.f_code, frame.f_lasti)
            actor = getcurrent().actor
            self.add("out of bounds", f"array_at of {num_elements} elements: {what}, by {actor.name} at {where}")
            raise Stopped
        return region

    def record(self, words: Region, at: int, like: Any) -> Any:
        """What device.records wrote into these words, with regions for arrays that are watched."""
        length = len(record_words(like, lambda array: 0))
        return read_record(np.array([words[i] for i in range(at, at + length)], np.int64), 0, like, self._view)

    def _view(self, address: int, num_elements: int, dtype: Any) -> Any:
        region = self._regions.get(address)
        if num_elements == 0:
            return self.nothing
        if region is None:  # weights, which nobody writes
            return memory_view(address, num_elements, dtype)
        return Parts(self, address, num_elements) if num_elements > region.size else region  # all, or the first ones

    def begin(self, with_places: bool = True, late_seed: int | None = None) -> None:
        """A new run: no access, no report. The arrays' contents are the caller's.

        Args:
            with_places: note of every access where in the source it was made. It takes twice the time, so it may be
                left to a second run under the same strategy and seed, once there is something to report.
            late_seed: decides which loads of words are late, and how late; None: none is.
        """
        self.with_places = with_places
        self._draw = None if late_seed is None else random.Random(late_seed).random
        self.reports, self._known, self.meetings, self.last_long_turn = [], set(), {}, 0
        for region in self._regions.values():
            region.forget()

    def lateness(self, fiber: Fiber) -> Callable[[], float] | None:
        """For a load that this fiber makes now: all stores have arrived where it polled for long after the last."""
        return None if fiber.polls > MOST_LATE_POLLS and fiber.found_nothing else self._draw

    def add(
        self, kind: str, text: str, key: Any = None, cell: tuple[str, Any] | None = None, sites: tuple[Site, ...] = ()
    ) -> None:
        """Report, unless the same has been said of the same places."""
        if (kind, key) not in self._known and len(self.reports) < self.MOST_REPORTS:
            self._known.add((kind, key))
            self.reports.append(Report(kind, text, cell, sites))


def joined(clocks: Sequence[list[int]]) -> list[int]:
    """The clock of whoever knows all that these know."""
    return [max(entries) for entries in zip(*clocks, strict=True)]


def _placed() -> Access:
    """The access that kernel code is making."""
    actor, frame = getcurrent().actor, kernel_frame(_frame(1))
    return actor, actor.clock[actor.index], frame.f_code, frame.f_lasti


def _where(access: Access) -> str:
    return place(access[2], access[3]) if access[2] else "an unknown place"


def _site(access: Access) -> Site:
    return Site(access[0].name, access[0].epoch, _where(access))


def _who(access: Access) -> str:
    return f"{access[0].name} in call {access[0].epoch} at {_where(access)}"
