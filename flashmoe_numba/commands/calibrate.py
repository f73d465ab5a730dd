"""Measure this machine with the kernel's own trace, and write it as hardware for `flashmoe sim --hardware FILE.toml`.

A rank becomes a GPU whose multiprocessors are the rank's blocks, one of them the OS block. What the file has no place
for (latencies of a tile, how rows are padded) are knobs of the policy flashmoe: the flags to give with the file are
printed, and are the file's first line. Ranks are threads of this process, with --backend cuda virtual ranks of one GPU;
the latter has not been run yet. Blocks that outnumber the cores wait for each other, and what is then measured is
mostly that: choose --ranks and --processors so that ranks x (processors + 1) is at most the number of cores.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sim
from reference import DTYPES
from sim.world.machine_files import to_toml

from ..errors import UsageError
from ..processes import launch
from ..processes.mpi_environment import unless_left_over
from .flags import check_backend_flag, integer
from .outputs import check_outputs

if TYPE_CHECKING:
    from ..bench.calibrate import Rates, Settings

L3_FILE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
L3_MB = 32.0  # where that file does not tell
UNUSED = "assumption: none, the policy flashmoe on one node never uses it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", required=True, metavar="FILE", help="the hardware file to write; must end in .toml")
    add("--ranks", type=integer(1), default=1, metavar="N", help="ranks, all in this process [1]")
    add("--processors", type=integer(1), metavar="N", help="blocks of a rank beside its OS block [a core for each]")
    add("--backend", choices=("cpu", "cuda"), default="cpu", help="what runs the kernel [cpu]")
    add("--dtype", choices=DTYPES, default="float32", help="element type [float32]")
    add("--repeats", type=integer(1), default=5, metavar="N", help="measured calls of each probe [5]")


def main(args: argparse.Namespace) -> int:
    """Measure, print, write."""
    if launch.inside_mpirun():
        rule = "calibrate runs all ranks in one process: start this without mpirun"
        raise UsageError(f"{rule}{unless_left_over(1)}")
    if not args.out.endswith(".toml"):
        raise UsageError(f"argument --out: must end in .toml, got {args.out!r}")
    check_backend_flag(args.backend)
    check_outputs({"--out": args.out})
    settings = settings_from(args.ranks, args.processors, args.backend, args.dtype, args.repeats)
    found = _measure(settings)
    if found is None:
        return 1
    hardware, flags = hardware_of(found, settings), set_flags(knobs_of(found, settings))
    Path(args.out).write_text(f"# simulate with {flags}\n{to_toml(hardware)}", encoding="utf-8")
    print("\n".join(lines(found, hardware)))
    print(f"\nsimulate on it with\nflashmoe sim --hardware {args.out} --dtype {args.dtype} {flags}")
    return 0


def settings_from(ranks: int, processors: int | None, backend: str, dtype: str, repeats: int) -> Settings:
    """Settings with a core for each block where there are enough; a warning on stderr where there are not."""
    from ..bench.calibrate import Settings
    from ..processes.cores import default_processors

    if backend == "cpu":
        cores = default_processors(1)
        processors = processors or max(1, cores // ranks - 1)
        blocks = ranks * (processors + 1)
        if blocks > cores:
            shared = f"{ranks} ranks of {processors} processors and an OS block are {blocks} threads on {cores} cores"
            print(f"flashmoe calibrate: warning: {shared}: times include waiting for a core", file=sys.stderr)
    return Settings(num_ranks=ranks, num_processors=processors, backend=backend, dtype=dtype, repeats=repeats)


def _measure(settings: Settings) -> Rates | None:
    """The rates; None if it failed in a way that the user can do something about, which is said."""
    from ..bench.calibrate import calibrate
    from ..errors import FlashMoEError

    try:
        return calibrate(settings)
    except (FlashMoEError, ImportError, MemoryError, RuntimeError, ValueError) as error:
        print(f"flashmoe calibrate: error: {error}", file=sys.stderr)
        return None


# ---- what the simulator is told


def hardware_of(found: Rates, settings: Settings) -> sim.Hardware:
    """The machine of these rates."""
    measured = _measured_text(settings)
    sms, ranks = found.processors + 1, settings.num_ranks
    read = found.read_gbps or found.combine_gbps
    reading = "weights and rows read by tiles" if found.read_gbps else "COMBINE"
    put = found.put_gbps or found.move_gbps
    signal = max(1, round(found.signal_ns))
    values: dict[str, tuple[Any, str]] = {
        "sms": (sms, f"processors of a rank and its OS block; {measured}"),
        "hbm_gbps": (read * found.processors, f"{reading}, of all processors; {measured}"),
        "hbm_achieved": (1.0, "hbm_gbps is what is achieved"),
        "hbm_gb": (_memory_gb() / ranks, "physical memory of this machine, shared out among the ranks"),
        "l2_mb": _last_cache_mb(ranks),
        "l2_gbps": (read * sms, f"{reading}, of all blocks: one reads no faster from a cache; {measured}"),
        "nvlink_gbps": (put * found.processors, f"DISPATCH to another rank, of all processors; {measured}"),
        "nvlink_latency_ns": (1, "stored rows are there when the DISPATCH ends; the signal is flag_ns"),
        "sm_write_gbps": (put, f"DISPATCH to another rank, within it if there is one only; {measured}"),
        "sm_read_gbps": (put, "assumption: as sm_write_gbps"),
        "flag_ns": (signal, f"end of DISPATCH to RECEIVE by an idle OS block; {measured}"),
        "barrier_ns": (2 * signal, "assumption: a signal there and one back"),
        "nic_gbps": (1.0, UNUSED),
        "nic_latency_ns": (1, UNUSED),
        "launch_ns": (max(1, round(found.outside_ns)), f"a call's time outside of the kernel; {measured}"),
        "graph_launch_ns": (max(1, round(found.outside_ns)), "assumption: as launch_ns"),
        "host_sync_ns": (max(1, round(found.outside_ns)), "assumption: as launch_ns"),
    }
    if settings.backend == "cpu":
        values["core_gbps"] = (1.0, UNUSED)
    values = {name: (_short(value), text) for name, (value, text) in values.items()}
    rate = f"least squares over tiles, for all blocks, with knob rate=1; {measured}"
    return sim.Hardware(
        name=f"{ranks} rank{'s' if ranks > 1 else ''} of this machine",
        num_nodes=1,
        gpus_per_node=ranks,
        tflops={settings.dtype: _short(found.gflops * sms / 1000)},
        sources={name: text for name, (_, text) in values.items()} | {f"tflops.{settings.dtype}": rate},
        **{name: value for name, (value, _) in values.items()},
    )


def knobs_of(found: Rates, settings: Settings) -> dict[str, Any]:
    """Knobs of the policy flashmoe with which it does what the kernel does here, for `MoEConfig`'s own tiles."""
    from ..bench.calibrate import ROWS, row_unit

    return {
        "rate": 1.0,
        "tile_latency_ns": round(found.tile_latency_ns),
        "blocks_per_sm": 1,
        "tile_m": max(ROWS),
        "ladder": True,
        "packing": "arrived",
        "dispatch_rows": 2**31 - 1,
        "async_loads": found.read_gbps is None,
        "poll_ns": round(found.receive_ns),
        "row_unit": row_unit(settings.backend),
    }


def set_flags(knobs: Mapping[str, Any]) -> str:
    """The knobs as flags of `flashmoe sim`."""
    return " ".join(f"--set {name}={str(value).lower()}" for name, value in knobs.items())


def lines(found: Rates, hardware: sim.Hardware) -> list[str]:
    """The table that people read."""
    from ..bench.calibrate import table

    title = f"{hardware.name}, {found.processors} processors and an OS block each; of one block, medians"
    return [title, *table(found)]


def _short(value: float) -> float:
    """Four digits are more than a repetition would confirm."""
    return value if isinstance(value, int) else float(f"{value:.4g}")


def _measured_text(settings: Settings) -> str:
    date = datetime.now(UTC).date().isoformat()
    return f"measured {date} by flashmoe calibrate, {settings.backend}, median over {settings.repeats} calls"


def _memory_gb() -> float:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9


def _last_cache_mb(ranks: int) -> tuple[float, str]:
    """Megabytes of the last-level cache for each rank, and where that is from."""
    try:
        size = int(L3_FILE.read_text().strip().removesuffix("K")) * 1024 / 1e6
        return size / ranks, f"{L3_FILE}, shared out among the ranks"
    except (OSError, ValueError):
        return L3_MB / ranks, f"assumption: {L3_MB:g} MB, shared out among the ranks; {L3_FILE} does not tell"
