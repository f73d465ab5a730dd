"""A history as lines that can be read: who did what to which cells, and where in the source.

Plain accesses read and write; atomic ones acquire, load (relaxed), release, add and swap.

Polls that found nothing are left out, and counted at the load that found something. Between two atomic accesses nobody
else can tell in which order a fiber made its plain ones, so there they are put together by function. Left out, unless
a report is about them: what a block keeps for itself, reads of what its rank keeps for itself, progress counts, and
abort words that are not set.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from reference import MoEConfig

from ...kernel import control
from ..run.cells import Cells, split_name, value_of, word
from ..run.memory import LOADS, Actor, Region
from ..run.reports import Report
from .history import Event, Turn

PRIVATE = (" box ", " trace ", " scratch.", ".address")
STUCK = ("deadlock", "livelock")
MOST_WORDS = 4  # that a fiber is said to poll in the end
Place = tuple[Region, int]


class Line(NamedTuple):
    """What one fiber did in one function. `marked`: the report is about it."""

    who: str
    call: int
    where: str
    what: str
    marked: bool


@dataclass
class _Step:
    """Accesses that become one line."""

    function: str
    events: list[Event] = field(default_factory=list)


class Teller:
    """Tells runs of one layer.

    Args:
        report: what went wrong, whose accesses are marked; None: nothing.
    """

    def __init__(self, config: MoEConfig, report: Report | None) -> None:
        self._cells, self._report, self._kind = Cells(config), report, report.kind if report else ""

    def tell(self, turns: Sequence[Turn]) -> list[Line]:
        """All lines of a history; after a deadlock the last ones say who polls what."""
        vain, marked = _vain_polls(turns, self._kind in STUCK), self._marked(turns)
        self._polled, polled_last = _count_polls(turns, vain)
        told = [event for event in _events(turns) if event not in vain and (event in marked or not _is_noise(event))]
        lines = [
            self._line(actor, step, marked)
            for actor, events in itertools.groupby(told, key=lambda event: event.actor)
            for step in _steps(events)
        ]
        return [line for line in lines if line.what] + self._last_lines(polled_last)

    def _marked(self, turns: Sequence[Turn]) -> set[Event]:
        """The last access at each of the report's places; if it has none, all late loads."""
        if self._report is None:
            return set()
        if self._report.cell is None:
            return {event for event in _events(turns) if event.is_late}
        found = {}
        for event in _events(turns):
            if (event.region.name, event.i) == self._report.cell:
                found[event.actor.name, event.actor.epoch, event.where] = event
        return {found[site] for site in self._report.sites if site in found}

    def _last_lines(self, polled: Mapping[Actor, Collection[Place]]) -> list[Line]:
        if self._report and self._kind == "race":
            first, second = self._report.sites
            what = f"no chain of releases and acquires leads from {first.who} at {first.where} to here"
            return [Line(second.who, second.call, "", what, marked=True)]
        return [self._stuck(actor, places) for actor, places in polled.items() if self._kind in STUCK]

    def _stuck(self, actor: Actor, places: Collection[Place]) -> Line:
        words = [self._word(actor, region, i) for region, i in places if not _is_quiet_abort(region, i)]
        rest = [f"{len(words) - MOST_WORDS} more"] if len(words) > MOST_WORDS else []
        return Line(actor.name, actor.epoch, "", f"still polls {', '.join(words[:MOST_WORDS] + rest)}", marked=True)

    def _word(self, actor: Actor, region: Region, i: int) -> str:
        return f"{self._cell(actor, region, i)} = {value_of(region.name, int(region.cells[i]))}"

    # ---- one line

    def _line(self, actor: Actor, step: _Step, marked: set[Event]) -> Line:
        about = [event for event in step.events if event in marked]
        plain = [event for event in step.events if not event.atomic]
        phrases = [self._plain(actor, verb, plain) for verb in ("reads", "writes")]
        phrases += [self._atomic(actor, event) for event in step.events if event.atomic]
        where = (about or step.events)[-1].where
        return Line(actor.name, actor.epoch, where, "; ".join(filter(None, phrases)), marked=bool(about))

    def _plain(self, actor: Actor, verb: str, events: list[Event]) -> str:
        arrays: defaultdict[Region, dict[int, object]] = defaultdict(dict)
        for event in events:
            if event.verb == verb and (verb == "writes" or not self._in_books(event.region)):
                arrays[event.region][event.i] = event.value
        told = [
            self._whose(actor, region) + self._cells.tell(region.name, cells, brief=self._in_books(region))
            for region, cells in arrays.items()
        ]
        return f"{verb} {', '.join(told)}" if told else ""

    def _in_books(self, region: Region) -> bool:
        about = self._report and self._report.cell and self._report.cell[0]
        return region.name != about and self._cells.are_books(region.name)

    def _atomic(self, actor: Actor, event: Event) -> str:
        assert event.value is not None and event.newest is not None
        name, value = event.region.name, value_of(event.region.name, event.value)
        cell = self._cell(actor, event.region, event.i)
        if event.verb in LOADS:
            late = f", late: {value_of(name, event.newest)} is there" if event.is_late else ""
            after = f", polled {self._polled[event]} times" if event in self._polled else ""
            return f"{'loads' if event.verb == 'reads' else event.verb} {cell} = {value}{late}{after}"
        return f"{event.verb} {cell}{', now' if event.verb == 'adds to' else ' ='} {value}"

    def _cell(self, actor: Actor, region: Region, i: int) -> str:
        return self._whose(actor, region) + (word(region.name, i) or self._cells.tell(region.name, {i: None}))

    @staticmethod
    def _whose(actor: Actor, region: Region) -> str:
        rank = split_name(region.name)[0]
        return "" if rank in (None, actor.rank) else f"rank {rank}'s "


def _events(turns: Sequence[Turn]) -> itertools.chain[Event]:
    return itertools.chain.from_iterable(turn.events for turn in turns)


def _vain_polls(turns: Sequence[Turn], stuck: bool) -> set[Event]:
    """What fibers looked at in the last round before a pause; also in one that they are stuck in."""
    vain: set[Event] = set()
    looked: defaultdict[Actor, list[Event]] = defaultdict(list)
    for turn in turns:
        actor = turn.events[0].actor
        for event in turn.events:
            looked[actor] = [*looked[actor], event] if event.verb in LOADS else []
        if turn.paused or (stuck and turn is turns[-1]):
            vain.update(_last_round(looked[actor]))
        if not turn.gave_way:
            looked[actor] = []
    return vain.union(*looked.values()) if stuck else vain


def _last_round(looked: Sequence[Event]) -> Iterator[Event]:
    """From the end, until a word is met that this place has looked at already: that was the round before."""
    seen = set()
    for event in reversed(looked):
        at = event.region, event.i, event.code, event.instruction
        if event.atomic and at in seen:
            return
        seen.add(at)
        yield event


def _count_polls(turns: Sequence[Turn], vain: set[Event]) -> tuple[dict[Event, int], dict[Actor, Collection[Place]]]:
    """How often a load's word was polled till it found something; and what they poll who still do."""
    polled: dict[Event, int] = {}
    counts: defaultdict[Actor, Counter[Place]] = defaultdict(Counter)
    last: dict[Actor, Event] = {}
    for event in _events(turns):
        mine, at, last[event.actor] = counts[event.actor], (event.region, event.i), event
        if event in vain:
            mine.update([at] * event.atomic)
        elif event.verb not in LOADS:
            mine.clear()
        elif at in mine:
            polled[event] = mine.pop(at) + 1
    return polled, {actor: counts[actor] for actor in last if last[actor] in vain}


def _is_noise(event: Event) -> bool:
    name = split_name(event.region.name)[1]
    if name == "control" and event.i == control.PROGRESS:
        return True
    private = any(part in event.region.name for part in PRIVATE)
    return private or (event.verb in LOADS and _is_quiet_abort(event.region, event.i))


def _is_quiet_abort(region: Region, i: int) -> bool:
    return split_name(region.name)[1] == "control" and i == control.ABORT and region.cells[i] == 0


def _steps(events: Iterable[Event]) -> list[_Step]:
    """One fiber's accesses as lines: up to each atomic access, by function."""
    steps: list[_Step] = []
    open_steps: dict[str, _Step] = {}
    for event in events:
        function = event.code.co_name
        joins = function in open_steps and (not event.atomic or open_steps[function] is steps[-1])
        if not joins:
            open_steps[function] = _Step(function)
            steps.append(open_steps[function])
        open_steps[function].events.append(event)
        if event.atomic:
            open_steps = {}
    return steps


# ---- as text


def as_text(lines: Sequence[Line], most: int) -> list[str]:
    """The last `most` lines and all marked ones before them, each fiber named where it begins or goes on."""
    kept = [i for i, line in enumerate(lines) if line.marked or i >= len(lines) - most]
    calls = len({line.call for line in lines}) > 1
    names = [f"{line.who}, call {line.call}" if calls else line.who for line in lines]
    width = max((len(names[i]) for i in kept), default=0)
    places = max((len(lines[i].where) for i in kept), default=0)
    text, before = [], -1
    for i in kept:
        if i > before + 1:
            text.append(f"  ... {i - before - 1} lines")
        name = "" if before == i - 1 >= 0 and names[i] == names[before] else names[i]
        line = lines[i]
        text.append(f"{'>' if line.marked else ' '} {name:{width}}  {line.where:{places}}  {line.what}")
        before = i
    return text
