"""One soak: layers on several hosts, one after the other; are results right, and has anything grown?"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .calls import Work, expected, soak_layers
from .faults import FIRST
from .held import NOTHING, Held, complaints, most
from .namespaces import WITH_PARENT, Hosts
from .started import Started
from .trial import left_behind

PATIENCE_S = 150.0  # more than the deadline of a call, which says more


@dataclass
class Soak:
    """What came of it.

    Args:
        load: the system's, of the last five minutes.
        kept: what the ranks have grown by between the ends of the first and of the last round, the most of each.
        ends_kib: resident memory of the largest rank at the end of each round, without what its allocator has free.
        in_layer: likewise in the last two thirds of a small layer's calls, from the second round on.
        problems: what is not as it should be, in words.
    """

    layers: int = 0
    calls: int = 0
    wrong: int = 0
    seconds: float = 0.0
    load: float = 0.0
    kept: Held = NOTHING
    ends_kib: list[int] = field(default_factory=list)
    in_layer: Held = NOTHING
    problems: list[str] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in ("layers", "calls", "wrong", "seconds", "load")}
        grown = {**self.kept._asdict(), "layer_kib": self.in_layer.allocated_kib, "ends_kib": self.ends_kib}
        return counts | grown | {"problems": len(self.problems)}


def one_soak(num_hosts: int, ranks_per_host: int, rounds: int, calls: int, load: int = 0) -> Soak:
    """Run it, with `load` processes more that keep cores busy."""
    num_ranks = num_hosts * ranks_per_host
    layers = [layer for of_round in soak_layers(num_ranks, rounds, calls) for layer in of_round]
    for work in {work for work, _ in layers}:
        next(expected(work))  # so that no rank compiles while others wait
    found = Soak(layers=len(layers))
    with Hosts(FIRST + num_hosts) as hosts, tempfile.TemporaryDirectory(prefix="flashmoe_soak_") as folder:
        begun = time.monotonic()
        ranks = Started(hosts, num_ranks, Path(folder), "soaking.py", rounds, calls)
        try:
            with busy(load):
                found.problems += _run(ranks)
            found.seconds, found.load = time.monotonic() - begun, os.getloadavg()[1]
            if min(ranks.calls()) > 0:
                compare(ranks, layers, found)
                look_for_growth(ranks, max(work.call_kib for work, _ in layers), found)
        finally:
            ranks.close()
    return found


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep so many cores busy."""
    command = [*WITH_PARENT, "KILL", sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _run(ranks: Started) -> list[str]:
    """Until all is over; what was wrong about that."""
    try:
        ranks.wait_for_calls(1)
        ranks.wait_for_end(PATIENCE_S)
    except TimeoutError as error:
        return [str(error)]
    problems = [f"rank {rank}: {text}" for rank, (_, text) in sorted(ranks.errors().items())]
    if status := ranks.process.poll():
        problems.append(f"mpirun's status is {status}: {(ranks.folder / 'stderr').read_text()[-3000:]}")
    return problems + left_behind(ranks)


def compare(ranks: Started, layers: Sequence[tuple[Work, range]], found: Soak) -> None:
    """Every result with that of one process."""
    saved = [ranks.digests(rank) for rank in range(ranks.num_ranks)]
    found.calls = min(map(len, saved))
    for work, numbers in layers:
        for call, wanted in zip(numbers, expected(work, numbers.start), strict=False):
            for rank, want in enumerate(wanted):
                if call < len(saved[rank]) and saved[rank][call] != want:
                    found.wrong += 1
    if found.wrong:
        found.problems.append(f"{found.wrong} results of ranks are not those of one process")
    if found.calls < (asked := layers[-1][1].stop):
        found.problems.append(f"{found.calls} calls of {asked} were made")


def look_for_growth(ranks: Started, early_kib: int, found: Soak) -> None:
    """In what the ranks have said that they hold; `early_kib` as `complaints` has it."""
    kept, in_layers, at_ends = [], [], []
    for rank in range(ranks.num_ranks):
        lines = [json.loads(line) for line in (ranks.folder / f"{rank}.held").read_text().splitlines()]
        ends = [Held(*line["held"]) for line in lines if "held" in line]
        kept += [ends[-1].since(ends[0])] if ends else []
        at_ends.append([end.resident_kib for end in ends])
        in_layers += [Held(*line["grown"]) for line in lines if "grown" in line and line["round"] > 0]
    found.kept, found.in_layer = most(kept), most(in_layers)
    found.ends_kib = [max(of_ranks) for of_ranks in zip(*at_ends, strict=False)]
    found.problems += complaints(found.kept, early_kib)
