"""A failing run made small: first its world, then its schedule.

A smaller world is tried under the default order, under the choices that failed before, and under some seeds of PCT and
of a random strategy; it is taken if one of these runs has the same finding (reports.finding). When no size can be made
smaller, the choices of its schedule are minimised by delta debugging. Loads are late only if it takes that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

from reference.layout import SAVES

from ...device.fibers import Strategy
from ..choose.schedules import Choice, Recorded, Scheduled
from ..choose.strategies import make_strategy
from ..run.checks import Checker
from ..run.program import FORWARD, without
from ..run.reports import Report, finding
from ..run.spec import OF_BACKWARDS, WorldSpec
from ..run.world import Run, WatchedWorld
from .cases import Case
from .ddmin import ddmin

MOST_RUNS = 3000
SEEDS = 5  # of each strategy, in a smaller world
DEPTH = 3  # of PCT
FEW_CHOICES = 3  # more are worth another start
SIZES = (
    "epochs", "num_ranks", "num_experts", "num_topk", "num_tokens", "capacity", "num_processors", "lanes", "hidden",
    "ffn",
)  # fmt: skip
MANY = 4  # times the turns of the first run: a smaller world should need fewer
JUDGED = ("wrong result", "tiles", "count")  # kinds that come from checks.py, not from the run itself


class _Spent(Exception):
    """All runs that were allowed have been made."""


class Shrinker:
    """Makes runs until nothing gets smaller, or until they are spent.

    Args:
        kernel: with this plant, watched.
        plant: its name, or None.
        report: what the smaller run has to find, too.
        most_runs: the budget. Whatever time it takes, the same run comes out.
        told: is called before every run, with the number of runs and the best case so far.
    """

    def __init__(
        self,
        kernel: ModuleType,
        plant: str | None,
        report: Report,
        most_runs: int = MOST_RUNS,
        told: Callable[[int, Case | None], None] = lambda runs, best: None,
    ) -> None:
        self._kernel, self._plant, self._finding = kernel, plant, finding(report)
        self._most_runs, self._told = most_runs, told
        self._most_turns: int | None = None  # of a run: one that goes astray may go on for long
        self._steps = 0  # of the last run
        self.runs = 0
        self.complete = False  # nothing more can be left out
        self.best: Case | None = None

    def shrink(self, world: WatchedWorld, make: Callable[[], Strategy], late_seed: int | None) -> Case:
        """The smallest case found, from the run of this strategy; Ctrl-C ends it, too.

        Raises:
            ValueError: the run has not the report.
        """
        first = self.best = self._fails(world, make, late_seed)
        if first is None:
            raise ValueError("the run does not give its report again by itself")
        with contextlib.suppress(_Spent, KeyboardInterrupt):
            for step in (self._without_late_loads, self._smaller_world, self._shorter_schedule):
                self.best = step(self.best or first)
            self.complete = True
        return self.best or first

    # ---- the world

    def _without_late_loads(self, best: Case) -> Case:
        return (self._find(best, best.spec, late=False) if best.late_seed is not None else None) or best

    def _smaller_world(self, best: Case) -> Case:
        """Until no single size can be made smaller."""
        again = True
        while again:
            again = False
            for spec in smaller(best.spec):
                found = self._find(best, spec, late=best.late_seed is not None)
                if found:
                    self.best = best = found
                    again = True
                    break
        return best

    def _find(self, best: Case, spec: WorldSpec, late: bool) -> Case | None:
        """A run of this world that fails; with late loads only if it has to be."""
        world = WatchedWorld(spec, self._kernel)
        for make, seed in self._strategies(best):
            found = self._fails(world, make, None)
            found = found or (self._fails(world, make, seed) if late else None)
            if found:
                return found
        return None

    def _strategies(self, best: Case) -> Iterator[tuple[Callable[[], Strategy], int]]:
        """Strategies of runs that may fail like the best one, each with a seed of late loads."""
        last_seed = best.late_seed or 0
        yield Scheduled, last_seed
        yield lambda: Scheduled(best.schedule), last_seed
        for seed in range(SEEDS):
            for name in ("pct", "random"):
                yield partial(make_strategy, name, seed, num_steps=self._steps, depth=DEPTH), seed

    # ---- the schedule

    def _shorter_schedule(self, best: Case) -> Case:
        world = WatchedWorld(best.spec, self._kernel)
        best = self._minimal(world, best)
        if len(best.schedule) > FEW_CHOICES:  # another one that fails may be a better start
            for make, seed in self._strategies(best):
                found = self._fails(world, make, seed if best.late_seed is not None else None)
                if found:
                    best = min(best, self._minimal(world, found), key=lambda case: len(case.schedule))
        return best

    def _minimal(self, world: WatchedWorld, case: Case) -> Case:
        """The case, with choices left out that it does not take."""
        found = {case.schedule: case}

        def fails(choices: Sequence[Choice]) -> bool:
            failed = self._fails(world, lambda: Scheduled(choices), case.late_seed)
            if failed:
                found[tuple(choices)] = failed
                self.best = min(failed, self.best or failed, key=lambda each: len(each.schedule))
            return failed is not None

        return found[tuple(ddmin(case.schedule, fails))]

    def _fails(self, world: WatchedWorld, make: Callable[[], Strategy], late_seed: int | None) -> Case | None:
        """The run as a case, if it has the finding."""
        run = self._run(world, make, late_seed)
        reports = Checker(world).check(run) if self._finding[0] in JUDGED else run.reports
        report = next((report for report in reports if finding(report) == self._finding), None)
        if report is None:
            return None
        schedule = tuple(run.strategy.choices)
        return Case(spec=world.spec, plant=self._plant, late_seed=late_seed, schedule=schedule, report=f"{report}")

    def _run(self, world: WatchedWorld, make: Callable[[], Strategy], late_seed: int | None) -> Run[Recorded]:
        """One more run, if one is left."""
        if self.runs == self._most_runs:
            raise _Spent
        self._told(self.runs, self.best)
        self.runs += 1
        run = world.run(lambda: Recorded(make(), self._most_turns), late_seed)
        self._steps = run.strategy.steps
        self._most_turns = self._most_turns or MANY * run.strategy.turns
        return run


def smaller(spec: WorldSpec) -> Iterator[WorldSpec]:
    """Worlds that differ in one way, the simplest of each first."""
    config = spec.config
    for leaver in spec.leavers:
        yield replace(spec, leavers=tuple(rank for rank in spec.leavers if rank != leaver))
    for lost in spec.lost:
        others = tuple(other for other in spec.lost if other != lost)
        yield replace(spec, lost=others)
        for tasks in sorted({0, lost.tasks // 2, max(0, lost.tasks - 1)} - {lost.tasks}):
            yield replace(spec, lost=(*others, lost._replace(tasks=tasks)))
    for name in ("grid", "ties", *OF_BACKWARDS):
        if getattr(spec, name):
            yield replace(spec, **{name: False})  # type: ignore[arg-type]
    for hosts in range(1, spec.hosts):
        yield replace(spec, hosts=hosts)
    if spec.packing != "none":
        yield replace(spec, packing="none")
    for changes in _other_programs(spec):
        with contextlib.suppress(ValueError):  # such a world there is not, here and below
            yield replace(spec, **changes)
    if config.capacity is not None:
        yield replace(spec, config=replace(config, capacity=None))
    for name in SIZES:
        now = getattr(config if hasattr(config, name) else spec, name) or 1  # a capacity may be None
        for value in sorted({*range(1, min(now, 4)), now // 2, now - 1} - {0, now}):
            with contextlib.suppress(ValueError):
                yield _resized(spec, name, value)


def _other_programs(spec: WorldSpec) -> Iterator[dict[str, Any]]:
    """What changes: nobody is astray, the simplest saving, a call less, a forward in place of a backward."""
    if spec.astray:
        yield dict(astray=())
    if spec.save is not None and not any(spec.program):
        yield dict(save=None, program=()) | dict.fromkeys(OF_BACKWARDS, False)
    if spec.save not in (None, SAVES[0]):
        yield dict(save=SAVES[0])
    simple = not (spec.lost or spec.given or spec.astray)  # which name calls by their numbers
    for call, forward in enumerate(spec.program, start=1):
        fewer = without(spec.program, call)
        if simple and fewer:
            yield dict(program=fewer, epochs=len(fewer))
        if forward and not spec.astray:
            yield dict(program=(*spec.program[: call - 1], FORWARD, *spec.program[call:]))


def _resized(spec: WorldSpec, name: str, value: int) -> WorldSpec:
    if name == "epochs":
        return replace(spec, epochs=value, given=spec.given[:value], program=spec.program[:value])
    if not hasattr(spec.config, name):
        return replace(spec, **{name: value})  # type: ignore[arg-type]
    most = value if name == "num_ranks" else spec.config.num_ranks
    leavers = tuple(rank for rank in spec.leavers if rank < most)
    lost = tuple(each for each in spec.lost if each.rank < most)
    astray = tuple(each for each in spec.astray if each.rank < most)
    config = replace(spec.config, **{name: value})  # type: ignore[arg-type]
    hosts = min(spec.hosts, most)
    return replace(spec, config=config, leavers=leavers, lost=lost, astray=astray, hosts=hosts)
