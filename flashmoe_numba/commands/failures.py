"""What `flashmoe explore` does with a run that is not clean: tell what happened, shrink it, replay it from a file."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reference.runs import PACKINGS

from ..device.fibers import Strategy
from ..errors import UsageError
from ..explore.choose.schedules import Scheduled
from ..explore.run.checks import Checker
from ..explore.run.program import in_words
from ..explore.run.reports import Report
from ..explore.run.spec import OF_BACKWARDS, WorldSpec
from ..explore.run.world import WatchedWorld
from ..explore.search import Explorer, Outcome, Search, watched_kernel
from ..explore.tell.cases import Case, load, save
from ..explore.tell.history import turns_until
from ..explore.tell.shrink import MOST_RUNS, Shrinker
from ..explore.tell.telling import Line, Teller, as_text
from .flags import integer
from .outputs import give

MOST_LINES = 40
BESIDE_REPLAY = ("--replay", "--history", "--json")


def add_failure_arguments(add: Any) -> None:
    """`--history`, `--shrink` and `--replay`; `add` is the add_argument of a parser or a group."""
    what = f"of a bad run, print the last N lines of what happened; 0 for none [{MOST_LINES}]"
    add("--history", type=integer(0), default=MOST_LINES, metavar="N", help=what)
    add("--shrink", metavar="FILE", help="make a bad run as small as can be, and write it to this file")
    add("--replay", metavar="FILE", help="run what --shrink wrote, and nothing else")


@dataclass(frozen=True)
class Story:
    """Reports of a run, and its history up to the first of them."""

    reports: list[Report]
    lines: list[Line]

    def text(self, most: int) -> list[str]:
        if not most or not self.lines:
            return []
        return ["what happened (> marks what the first report is about):", *as_text(self.lines, most)]

    def as_json(self) -> dict[str, Any]:
        return {
            "reports": [report._asdict() for report in self.reports],
            "history": [line._asdict() for line in self.lines],
        }


@dataclass(frozen=True)
class Shrunk:
    """What came of shrinking; `case` is None if the run did not fail again."""

    case: Case | None
    runs: int
    complete: bool
    story: Story | None

    def text(self, file: str, most: int) -> list[str]:
        if self.case is None or self.story is None:
            return ["not shrunk: the run does not give this report by itself"]
        how = f"in {self.runs} runs" if self.complete else f"as far as {self.runs} runs went"
        told = [f"  {report}" for report in self.story.reports]
        shrunk = f"shrunk {how}: {describe_case(self.case)}"
        return [shrunk, *told, *self.story.text(most), f"replay: flashmoe explore --replay {file}"]

    def as_json(self) -> dict[str, Any]:
        case = asdict(self.case) if self.case else None
        return {"case": case, "runs": self.runs, "complete": self.complete} | (
            self.story.as_json() if self.story else {}
        )


# ---- a search that failed


def tell(search: Search, bad: Outcome) -> Story:
    """What happened in a bad run, by making it once more in this process."""
    with watched_kernel(search.plant) as kernel:
        explorer = Explorer(search, kernel)
        return _story(explorer.world, explorer.again(bad), explorer.late_seed(bad.seed), bad.reports)


def shrink(search: Search, bad: Outcome, file: str) -> Shrunk:
    """Shrink a bad run, with progress on a terminal, and write it to a file."""
    from tqdm import tqdm

    with (
        watched_kernel(search.plant) as kernel,
        tqdm(total=MOST_RUNS, unit=" runs", desc="shrinking", disable=None, dynamic_ncols=True, leave=False) as bar,
    ):

        def told(runs: int, best: Case | None) -> None:
            bar.update(runs - bar.n)
            bar.set_postfix_str(describe_case(best) if best else "")

        explorer = Explorer(search, kernel)
        shrinker = Shrinker(kernel, search.plant, bad.reports[0], told=told)
        try:
            case = shrinker.shrink(explorer.world, explorer.again(bad), explorer.late_seed(bad.seed))
        except ValueError:
            return Shrunk(None, shrinker.runs, complete=False, story=None)
        save(case, Path(file))
        return Shrunk(case, shrinker.runs, shrinker.complete, _play(WatchedWorld(case.spec, kernel), case))


# ---- a run from a file


def replay(args: argparse.Namespace) -> int:
    """Run what `--shrink` wrote.

    Raises:
        UsageError: there is no such file, or it is none of --shrink, or other flags contradict it.
    """
    _check_flags(args.argv)
    try:
        case = load(Path(args.replay))
    except OSError as error:
        raise UsageError(f"argument --replay: cannot read {args.replay!r}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"argument --replay: {args.replay!r} is no file of --shrink: {error}") from None
    with watched_kernel(case.plant) as kernel:
        story = _play(WatchedWorld(case.spec, kernel), case)
    lines = [describe_case(case), *_replayed(story, case, args.history)]
    give(args.json, lines, {"case": asdict(case), "clean": not story.reports} | story.as_json())
    return 1 if story.reports else 0


def _check_flags(argv: list[str]) -> None:
    given = [word.partition("=")[0] for word in argv if word.startswith("--")]
    others = [flag for flag in given if not any(allowed.startswith(flag) for allowed in BESIDE_REPLAY)]
    if others:
        raise UsageError(f"argument --replay: the file says what is run, so {others[0]} must not be given")


def _replayed(story: Story, case: Case, most: int) -> list[str]:
    if story.reports:
        return ["not clean:", *[f"  {report}" for report in story.reports], *story.text(most)]
    return [f"clean: what the file tells of does not come any more: {case.report}"]


def _play(world: WatchedWorld, case: Case) -> Story:
    def make() -> Strategy:
        return Scheduled(case.schedule)

    reports = Checker(world).check(world.run(make, case.late_seed))
    first = [report for report in reports if f"{report}" == case.report]
    return _story(world, make, case.late_seed, first + [report for report in reports if report not in first])


def _story(world: WatchedWorld, make: Callable[[], Strategy], late_seed: int | None, reports: list[Report]) -> Story:
    if not reports:
        return Story([], [])
    turns = turns_until(world, make, late_seed, until=reports[0])
    return Story(reports, Teller(world.spec.config, reports[0]).tell(turns))


# ---- in words


def describe_world(spec: WorldSpec) -> str:
    """Sizes, in one line."""
    c = spec.config
    capacity = "no limit" if c.capacity is None else f"capacity {c.capacity}"
    sizes = f"{c.num_tokens} tokens a rank, top {c.num_topk} of {c.num_experts} experts, {capacity}"
    blocks = f"{c.num_ranks} ranks x {spec.num_processors} processors + 1, {spec.lanes} lanes"
    told = [f"on {spec.hosts} hosts"] if spec.hosts > 1 else []
    told += [f"rank {rank} gives up" for rank in spec.leavers]
    told += [f"rank {lost.rank} is lost in call {lost.call} after {lost.tasks} tasks" for lost in spec.lost]
    told += [f"deadline {spec.deadline}"] if spec.deadline is not None else []
    told += [f"{in_words(spec.program)} (save {spec.save})"] if spec.save else []
    told += [name.replace("_", " ") for name in OF_BACKWARDS if getattr(spec, name)]
    told += [f"rank {own.rank} makes a {in_words((own.call,))} last" for own in spec.astray]
    told += [f"packing {spec.packing}"] if spec.packing != PACKINGS[0] else []
    told += [word for word, is_so in (("ties", spec.ties), ("in one grid", spec.grid)) if is_so]
    return ", ".join([f"{blocks}, {spec.epochs} calls: {sizes}", *told])


def describe_case(case: Case) -> str:
    plant = f", plant {case.plant}" if case.plant else ""
    late = "" if case.late_seed is None else ", late loads"
    choices = f"{len(case.schedule)} switches beside the default order"
    return f"{describe_world(case.spec)}; {choices}{late}{plant}"
