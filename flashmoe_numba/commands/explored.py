"""What `flashmoe explore` says of its runs: how many there were, how they ended, how a bad one is made again."""

from __future__ import annotations

import argparse
import shlex
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from ..explore.choose.choice_tree import COMPLETE, REDUNDANT, UNFINISHED
from ..explore.exhaustive import EXHAUSTIVE
from ..explore.search import Outcome, Search
from .failures import describe_world
from .spread import STOPS, why_stopped

REPLACED = ("--seed", "--seeds", "--jobs", "--history", "--shrink")


@dataclass
class Tally:
    """Runs until the first that is not clean, or until something ended the search early."""

    runs: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    all_made: bool = False
    switches: int = 0
    busy_s: float = 0.0  # of all processes together
    wall_s: float = 0.0
    bad: Outcome | None = None
    stop: BaseException | None = None  # what ended the search early

    def rates(self) -> dict[str, float]:
        return {
            "runs_per_s": self.runs / self.wall_s,
            "switches_per_s": self.switches / self.wall_s,
            "runs_per_process_s": self.runs / (self.busy_s or 1),
        }


def count(outcomes: Iterable[Outcome]) -> Tally:
    """Make the runs, and count them."""
    tally, start = Tally(), time.perf_counter()
    try:
        for outcome in outcomes:
            tally.runs += 1
            tally.ends[outcome.end] += 1
            tally.switches += outcome.switches
            tally.busy_s += outcome.seconds
            if outcome.reports:
                tally.bad = outcome
                break
            tally.all_made = outcome.is_last
    except STOPS as stop:
        tally.stop = stop
    tally.wall_s = time.perf_counter() - start
    return tally


def describe(searches: dict[str, Search]) -> str:
    """What is searched, in one line."""
    (name, search), *others = searches.items()
    plant = f", plant {search.plant}" if search.plant else ""
    world = f"{name}: {describe_world(search.spec)}" if not others else f"{len(searches)} worlds: {', '.join(searches)}"
    return f"{world}; strategy {search.strategy}{plant}"


def lines(args: argparse.Namespace, searches: dict[str, Search], tally: Tally) -> list[str]:
    """What people read when the runs are made."""
    runs, switches, in_each = tally.rates().values()
    rate = f"{runs:,.0f} runs/s, {switches:,.0f} switches/s; {in_each:,.0f} runs/s in each process"
    counted = f"{tally.runs} runs in {tally.wall_s:.1f} s: {rate}"
    said = [counted, *([_covered(tally)] if args.strategy == EXHAUSTIVE else [])]
    if tally.bad is None:
        clean = "clean so far" if tally.stop else "clean"
        if args.plant:
            where = "this world and these runs; another" if len(searches) == 1 else "these runs; others"
            clean += f": {args.plant} does not show in {where} may have what it takes"
        return [*said, *(["nothing to shrink"] if args.shrink else []), clean]
    name = "run" if args.strategy == EXHAUSTIVE else "seed"
    said += [f"{name} {tally.bad.seed} is not clean:", *[f"  {report}" for report in tally.bad.reports]]
    if len(searches) > 1:
        world = list(searches)[tally.bad.seed % len(searches)]
        said.append(f"its world: {world}: {describe_world(searches[world].spec)}")
    return said


def _covered(tally: Tally) -> str:
    """Of an exhaustive search."""
    ends = tally.ends
    whole = "all there are" if tally.all_made else "not all there are"
    others = f"{ends[UNFINISHED]:,} runs could not be completed, {ends[REDUNDANT]:,} were cut short as redundant"
    return f"{ends[COMPLETE]:,} interleavings up to the order of independent accesses, {whole}; {others}"


def replay_command(argv: list[str], search: Search, seed: int) -> str:
    """The command that runs this seed alone; an exhaustive search comes to the same run again."""
    if search.strategy == EXHAUSTIVE:
        return shlex.join(["flashmoe", *argv])
    kept, words = [], iter(argv)
    for word in words:
        if word in REPLACED:
            next(words, None)
        elif word.partition("=")[0] not in REPLACED:
            kept.append(word)
    return shlex.join(["flashmoe", *kept, "--seed", str(seed), "--seeds", "1"])


def as_json(
    args: argparse.Namespace, searches: dict[str, Search], search: Search, processes: int, tally: Tally
) -> dict[str, Any]:
    """What programs read; `search` is the bad run's, or the first one."""
    bad = tally.bad
    return {
        "worlds": list(searches),
        "search": asdict(search),
        "first_seed": args.seed,
        "jobs": processes,
        "runs": tally.runs,
        "ends": dict(tally.ends),
        "all_made": tally.all_made,
        **tally.rates(),
        "stopped": why_stopped(tally.stop) if tally.stop else None,
        "clean": bad is None,
        "bad_seed": bad.seed if bad else None,
        "reports": [report._asdict() for report in bad.reports] if bad else [],
        "history": [],
        "shrunk": None,
        "replay": replay_command(args.argv, search, bad.seed) if bad else None,
    }
