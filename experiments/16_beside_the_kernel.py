"""Question: how far is the simulator from the machine at hand?

Command:  python experiments/16_beside_the_kernel.py [--hardware FILE.toml --set KNOB=VALUE ...] [--ranks N]
          [--packing sources|none]
Expected: `busy_error` of some 5 %, GEMM0 and GEMM1 being nearly all of it. On a machine with nothing else to do whole
          calls are as near. Programs beside it make them longer, several times if they want the same cores, and so do
          blocks that outnumber the cores: the simulator knows of neither.

Without --hardware the machine is calibrated first, as by `flashmoe calibrate`, which prints the flags to give here. No
layer below is one of the calibration's. Each is run by the CPU kernel, and its own routing is simulated by the policy
flashmoe on the calibrated machine. Repeats go round all layers.

`measured` and `fastest` are the median and the fastest call, `simulated` is the makespan, and `error` compares it with
either. `row tiles` are those of the median call, and of the simulation. `busy` is the time in slices of tasks: each
task's median over the calls that had it, so that a slice that was interrupted does not count, summed over as many tasks
as a call has, and divided by the processors; then the same of the simulation, and its error. Columns of kinds are
simulated / measured for the slices of that kind. Traces of the fastest call and of the simulation are written under
--traces, in files of one name.

Tiles packed by sources are not the same in every call where there are several ranks, and a task's name may stand for
other rows in another call; with one rank they are.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import Row, parser_of, show, store

import sim
from flashmoe_numba import FlashMoE
from flashmoe_numba.bench.calibrate import Settings, calibrate
from flashmoe_numba.bench.measure import SETTLE_S
from flashmoe_numba.bench.memory import make_memory
from flashmoe_numba.commands.calibrate import hardware_of, knobs_of, lines, settings_from
from flashmoe_numba.commands.flags import integer
from flashmoe_numba.commands.knobs import knobs_from
from flashmoe_numba.errors import UsageError
from flashmoe_numba.seeing.trace import decode, write_chrome_trace
from reference import DTYPES, MoEConfig, Weights, make_workload
from reference.traces import TRACE_KIND_NAMES, Slice
from sim.engine.kinds import GEMM0, JOIN, KIND_NAMES
from sim.world.routing import blocked_owner

KINDS = ("GATE", "DISPATCH", "GEMM0", "GEMM1", "COMBINE")
SIMULATED = {"sources": "arrived", "none": "per_source"}  # what the policy calls the kernel's packing


class Case(NamedTuple):
    """A layer and what it is run on; tokens and experts are those of each rank."""

    tokens: int
    experts: int
    topk: int
    gated: bool
    workload: str
    hidden: int = 512
    ffn: int = 1024

    @property
    def name(self) -> str:
        layer = f"{self.hidden}x{self.ffn}-{'gated' if self.gated else 'plain'}-{self.experts}-experts-top{self.topk}"
        return f"{layer}-{self.tokens}-tokens-{self.workload.replace(':', '')}"


CASES = (
    Case(64, 8, 1, False, "uniform"),
    Case(64, 32, 2, True, "text"),
    Case(256, 8, 2, True, "uniform"),
    Case(256, 16, 1, False, "zipf:1.0"),
    Case(512, 32, 2, True, "text"),
    Case(1024, 16, 2, False, "hot"),
    Case(1024, 32, 1, True, "zipf:1.2"),
    Case(2048, 8, 1, True, "uniform"),
    Case(2048, 32, 2, False, "text"),
    Case(512, 16, 2, True, "zipf:1.0", hidden=256, ffn=640),
    Case(384, 8, 2, False, "text", hidden=1024, ffn=512),
    Case(128, 16, 2, True, "hot", hidden=1280, ffn=1792),
)
SMOKE_CASES = (Case(24, 4, 1, True, "uniform", ffn=256),)


def main() -> int:
    args = _parser().parse_args()
    try:
        hardware, knobs = _machine(args)
    except (UsageError, ValueError, FileNotFoundError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    cases = SMOKE_CASES if args.smoke else CASES
    how = dict(num_processors=hardware.sms - 1, backend=args.backend, packing=args.packing)
    runs = [Run(case, hardware.num_gpus, args.dtype, how) for case in cases]
    for _ in range(2 if args.smoke else args.repeats):
        for run in runs:
            run.measure()
    rows = [run.row(hardware, knobs, args.traces) for run in runs]
    print(f"\nmeasured, and simulated on {hardware.name} by the policy flashmoe")
    show(rows, COLUMNS)
    print("\ntasks of all layers, summed by kind")
    show(by_kind(rows), KIND_COLUMNS)
    print()
    for name, of in (
        ("error_median", "the median call"),
        ("error_fastest", "the fastest"),
        ("busy_error", "busy time"),
    ):
        print(f"mean error of {of}: {np.mean([abs(row[name]) for row in rows]):.1%}")
    print(f"traces: {args.traces}")
    store(rows, args.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__)
    parser.add_argument("--hardware", metavar="FILE.toml", help="of `flashmoe calibrate`, instead of calibrating here")
    parser.add_argument("--set", action="append", default=[], metavar="KNOB=VALUE", help="goes with --hardware")
    parser.add_argument("--ranks", type=integer(1), default=1, help="ranks, as threads, of the calibration here [1]")
    parser.add_argument("--processors", type=integer(1), help="blocks of a rank beside its OS block [a core for each]")
    parser.add_argument(
        "--backend", choices=("cpu", "cuda"), default="cpu", help="cuda: virtual ranks of one GPU [cpu]"
    )
    parser.add_argument("--packing", choices=[*SIMULATED], default="sources", help="whose rows share a tile [sources]")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="element type [float32]")
    parser.add_argument("--repeats", type=integer(1), default=9, help="measured calls of each layer [9]")
    parser.add_argument("--traces", type=Path, default=Path("out/beside_the_kernel"), metavar="FOLDER")
    return parser


def _machine(args: argparse.Namespace) -> tuple[sim.Hardware, sim.PolicyKnobs]:
    """The hardware of the file and the knobs of --set, or those of a calibration."""
    if bool(args.hardware) != bool(args.set):
        raise UsageError("--hardware and --set go together: the first line of a calibrated file has the flags")
    if args.hardware:
        return sim.load_hardware(args.hardware), knobs_from(["flashmoe"], args.set)["flashmoe"]
    repeats = 1 if args.smoke else 5
    settings: Settings = settings_from(args.ranks, args.processors, args.backend, args.dtype, repeats)
    found = calibrate(settings)
    hardware = hardware_of(found, settings)
    print("\n".join(lines(found, hardware)), flush=True)
    return hardware, sim.make_knobs("flashmoe", knobs_of(found, settings))


class Run:
    """One case on the kernel, and beside it in the simulator."""

    def __init__(self, case: Case, num_ranks: int, dtype: str, how: dict[str, Any]) -> None:
        self.case, self.packing = case, how["packing"]
        self.config = MoEConfig(
            num_ranks=num_ranks,
            num_tokens=case.tokens,
            hidden=case.hidden,
            ffn=case.ffn,
            num_experts=case.experts * num_ranks,
            num_topk=case.topk,
            gated=case.gated,
            activation="silu",
            dtype=dtype,
        )
        workload = make_workload(case.workload, self.config)
        memory = make_memory(how["backend"], self.config)
        self._x, self._routing = [memory.to_device(part) for part in workload.x], {}
        if workload.topk_idx is not None:
            self._routing = {"topk_idx": workload.topk_idx, "topk_weights": workload.topk_weights}
        weights = Weights.random(self.config)
        self._layer = FlashMoE(self.config, weights, trace=True, **how)
        self._call()
        self._wall_ns: list[int] = []
        self._row_tiles: list[int] = []  # of each call
        self._records: list[Slice] = []  # of the fastest call
        self._times: dict[tuple[int, ...], list[int]] = defaultdict(list)  # of each task

    def _call(self) -> None:
        self._layer(self._x, **self._routing)
        self._layer.synchronize()

    def measure(self) -> None:
        """One call; of the fastest the records are kept, of all the times of each task."""
        time.sleep(SETTLE_S / 10)
        start = time.perf_counter_ns()
        self._call()
        self._wall_ns.append(time.perf_counter_ns() - start)
        records = decode(self._layer.traces)
        self._row_tiles.append(sum(task.kind == GEMM0 and task.n == 0 for task in records))
        if self._wall_ns[-1] == min(self._wall_ns):
            self._records = records
        for task in records:
            key = (task.kind, task.rank, task.peer, task.expert, task.m, task.n)
            self._times[key].append(task.end_ns - task.start_ns)

    def row(self, hardware: sim.Hardware, knobs: sim.PolicyKnobs, folder: Path) -> Row:
        """Both times and all kinds; writes both traces."""
        simulation = self._simulate(hardware, knobs)
        for side in ("measured", "simulated"):
            (folder / side).mkdir(parents=True, exist_ok=True)
        name = f"{self.case.name}.json"
        write_chrome_trace(self._records, self._layer.num_processors, folder / "measured" / name)
        sim.write_chrome_trace(simulation, folder / "simulated" / name)
        median, fastest = float(np.median(self._wall_ns)) / 1e6, min(self._wall_ns) / 1e6
        simulated = simulation.latency_us / 1000
        calls = len(self._wall_ns)
        measured_kinds, simulated_kinds = kinds_of_tasks(self._times, calls), kinds_of_simulation(simulation)
        processors = self.config.num_ranks * self._layer.num_processors
        busy, simulated_busy = (
            sum(kinds[kind] for kind in KINDS) / processors for kinds in (measured_kinds, simulated_kinds)
        )
        self._layer.close()
        return {
            **self.case._asdict(),
            "gated": "gated" if self.case.gated else "plain",
            "ranks": self.config.num_ranks,
            "hardware": hardware.name,
            "packing": self.packing,
            "repeats": calls,
            "row_tiles": float(np.median(self._row_tiles)),
            "row_tiles_simulated": int((simulation.graph.nodes["kind"] == GEMM0).sum()),
            "measured": median,
            "fastest": fastest,
            "simulated": simulated,
            "error_median": simulated / median - 1,
            "error_fastest": simulated / fastest - 1,
            "busy": busy,
            "busy_simulated": simulated_busy,
            "busy_error": simulated_busy / busy - 1,
            "measured_kinds_ms": measured_kinds,
            "simulated_kinds_ms": simulated_kinds,
            **{kind: simulated_kinds[kind] / measured_kinds[kind] for kind in KINDS},
        }

    def _simulate(self, hardware: sim.Hardware, knobs: sim.PolicyKnobs) -> sim.Simulation:
        topk_idx = np.stack([routing.topk_idx for routing in self._layer.routing])
        owner = blocked_owner(self.config.num_experts, self.config.num_ranks)
        routing = sim.SimRouting(
            name=self.case.workload, num_experts=self.config.num_experts, topk_idx=topk_idx, owner=owner
        )
        scenario = sim.Scenario(config=self.config, hardware=hardware, precision=self.config.dtype, routing=routing)
        return sim.simulate(
            "flashmoe", scenario.make(), replace(knobs, gate=not self._routing, packing=SIMULATED[self.packing])
        )


def kinds_of_tasks(times: Mapping[tuple[int, ...], Sequence[int]], calls: int) -> dict[str, float]:
    """Milliseconds of a call's tasks by kind: of each its median, times the share of the calls that had it."""
    total = dict.fromkeys(TRACE_KIND_NAMES, 0.0)
    for (kind, *_), durations in times.items():
        total[TRACE_KIND_NAMES[kind]] += float(np.median(durations)) * len(durations) / calls / 1e6
    return total


def kinds_of_simulation(simulation: sim.Simulation) -> dict[str, float]:
    """The same of what was simulated."""
    timeline = simulation.timeline
    kind = simulation.graph.nodes["kind"][timeline.run_node]
    ns = np.bincount(kind, (timeline.run_end_ns - timeline.run_start_ns) * timeline.run_count, len(KIND_NAMES))
    return {name: total / 1e6 for name, total in zip(KIND_NAMES, ns.tolist(), strict=True) if name != KIND_NAMES[JOIN]}


def by_kind(rows: Sequence[Row]) -> list[Row]:
    """Sums over all rows, one row per kind of the kernel that ran."""
    result: list[dict[str, Any]] = []
    for kind in TRACE_KIND_NAMES:
        measured = sum(row["measured_kinds_ms"][kind] for row in rows)
        simulated = sum(row["simulated_kinds_ms"][kind] for row in rows)
        if measured:
            result.append({"kind": kind, "measured": measured, "simulated": simulated, "ratio": simulated / measured})
    return result


COLUMNS = {
    "hidden": "d",
    "ffn": "d",
    "tokens": "d",
    "experts": "d",
    "topk": "d",
    "gated": "",
    "workload": "",
    "measured ms": ".2f",
    "fastest ms": ".2f",
    "simulated ms": ".2f",
    "error_median": "+.1%",
    "error_fastest": "+.1%",
    "row_tiles": ".0f",
    "row_tiles_simulated": "d",
    "busy ms": ".2f",
    "busy_simulated ms": ".2f",
    "busy_error": "+.1%",
    **dict.fromkeys(KINDS, ".2f"),
}
KIND_COLUMNS = {"kind": "", "measured ms": ".2f", "simulated ms": ".2f", "ratio": ".2f"}


if __name__ == "__main__":
    sys.exit(main())
