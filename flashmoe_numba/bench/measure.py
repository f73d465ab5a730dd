"""Time a layer beside plain BLAS, and keep what is needed to check it.

One call warms up. Then each iteration is one call of the layer and one pass of the yardstick, in the same process, one
after the other, and between the two a call that keeps and its backward, if there are to be any; all ranks begin each at
the same moment, and its time is that of the slowest rank.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from reference import MoEConfig, Routing, Weights, Workload, make_workload

from ..checkpoints import load
from ..heap.stats import Stats
from ..layer.layer import FlashMoE
from ..processes.cores import default_processors
from ..seeing.trace import filled
from ..tile_gemm.arithmetic import AUTO, choose
from .backward import Backwards, random_gradients
from .calls import Call, digest
from .yardstick import make_yardstick

SETTLE_S = 0.15  # OpenBLAS's workers spin for 0.07 s after their work, on cores that the layer needs


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to run.

    Args:
        checkpoint: folder of a published model, whose layer of index `layer` has the weights; None: they are random.
        family: of that model's blocks, as `Checkpoint` has it.
        workload: a name for `make_workload`.
        num_tokens: of each rank; None: `config.num_tokens`, or what a recorded workload has.
        backend: "cpu", "cuda" or "fibers".
        in_process: all ranks in this process, instead of one process each.
        num_processors: blocks per rank beside the OS block; None: the layer's default.
        trace: keep the records of the last call.
        packing, arithmetic: as `FlashMoE` has them.
        save: what calls keep for their backwards, which are run, too; None: there are none.
        hosts, netmod: of ranks as processes: how many machines they are on, and what is between these (netmod.py).
    """

    config: MoEConfig
    checkpoint: str | None
    layer: int
    family: str | None
    workload: str
    num_tokens: int | None
    backend: str
    in_process: bool
    num_processors: int | None
    iterations: int
    seed: int
    deadline_s: float
    trace: bool
    packing: str
    arithmetic: str = AUTO
    save: str | None = None
    hosts: int = 1
    netmod: str | None = None

    @property
    def transport(self) -> str:
        """How ranks reach each other: "mpi", or in one process "threads", "virtual" (on one GPU) or "fibers"."""
        here = {"cpu": "threads", "cuda": "virtual", "fibers": "fibers"}[self.backend]
        return here if self.in_process else "mpi"

    @property
    def multiplied_by(self) -> str | None:
        """The arithmetic of the experts (tile_gemm/arithmetic.py); None where CPUs do not multiply."""
        return choose(self.arithmetic, self.config.dtype) if self.backend == "cpu" else None


@dataclass(kw_only=True)
class Measurement:
    """What one process saw; lists over its ranks, or over iterations.

    `y_digests` is a hash of the results of every call, the warm-up and those that keep included.
    """

    x: list[np.ndarray]
    y: list[np.ndarray]
    routing: list[Routing]
    stats: list[Stats]
    processors: int
    traces: dict[tuple[int, int], np.ndarray]
    latency_ns: list[int] = field(default_factory=list)
    blas_ns: list[int] = field(default_factory=list)
    y_digests: list[bytes] = field(default_factory=list)
    backwards: Backwards | None = None


def measure(settings: Settings, world: Any, show: bool = False) -> Measurement:
    """Run this process's part of the benchmark; every process of `world` must.

    Args:
        world: of `world.py`.
        show: draw a progress bar on stderr.

    Raises:
        FlashMoEError: a rank was lost.
    """
    config = settings.config
    ranks = range(config.num_ranks) if world.comm is None else range(world.rank_idx, world.rank_idx + 1)
    weights = make_weights(settings, ranks)
    workload = make_workload(settings.workload, config, settings.num_tokens, settings.seed, ranks)
    threads = ThreadpoolController()
    with make_layer(settings, weights, world.comm) as layer:
        blas_threads = num_blas_threads(settings, layer.num_processors)
        with threads.limit(limits=blas_threads):
            settle_s = SETTLE_S if blas_threads > 1 else 0
            return _measure(layer, workload, weights, settings, world, settle_s, show)


def make_weights(settings: Settings, ranks: range) -> Weights:
    """The weights of all ranks, or of one."""
    config = settings.config
    if settings.checkpoint is None:
        return Weights.random(config, settings.seed, experts=experts_of(ranks, config))
    own: dict[str, Any] = dict(num_ranks=config.num_ranks, num_tokens=config.num_tokens, dtype=config.dtype)
    rank_idx = None if len(ranks) == config.num_ranks else ranks.start
    return load(settings.checkpoint, settings.layer, family=settings.family, rank_idx=rank_idx, **own)[1]


def make_layer(settings: Settings, weights: Weights, comm: Any) -> FlashMoE:
    """The layer that the settings describe."""
    how: dict[str, dict[str, Any]] = {"fibers": {"seed": settings.seed}, "cpu": {"arithmetic": settings.arithmetic}}
    return FlashMoE(
        settings.config,
        weights,
        comm=comm,
        backend=settings.backend,
        num_processors=settings.num_processors,
        deadline_s=settings.deadline_s,
        trace=settings.trace,
        packing=settings.packing,
        save=settings.save,
        **how.get(settings.backend, {}),
    )


def experts_of(ranks: range, config: MoEConfig) -> range:
    """The experts that live on consecutive ranks."""
    return range(ranks.start * config.num_experts_per_rank, ranks.stop * config.num_experts_per_rank)


def num_blas_threads(settings: Settings, processors: int) -> int:
    """As many as the layer's processors in this process, up to the cores."""
    return min(default_processors(1), processors * (settings.config.num_ranks if settings.in_process else 1))


def _measure(
    layer: FlashMoE, workload: Workload, weights: Weights, settings: Settings, world: Any, settle_s: float, show: bool
) -> Measurement:
    call = Call(layer, workload, settings.backend, settings.in_process)
    world.meet("before the warm-up")
    call.run()
    y, stats = call.results(), call.per_rank(layer.stats)
    rows = [rows for part in stats for rows in part.rows_per_expert]
    yardstick = make_yardstick(settings.backend, settings.config, weights, rows)
    yardstick.run(world.note_progress)
    seen = Measurement(
        x=workload.x,
        y=y,
        routing=call.per_rank(layer.routing),
        stats=stats,
        processors=layer.num_processors,
        traces={},
    )
    seen.y_digests.append(digest(y))
    if settings.save is not None:
        first = 0 if settings.in_process else world.rank_idx
        seen.backwards = Backwards(random_gradients(workload.x, first, settings.seed))
        seen.backwards.warm_up(call)
    for iteration in _progress(range(settings.iterations), show):
        time.sleep(settle_s)
        which = f"{iteration + 1} of {settings.iterations}"
        world.meet(f"before call {which}")
        start = time.perf_counter_ns()
        call.run()
        seen.latency_ns.append(time.perf_counter_ns() - start)
        seen.y_digests.append(digest(call.results()))
        if seen.backwards is not None:
            seen.backwards.measure(call, world, which)
            seen.y_digests.append(digest(call.results()))
        world.meet(f"before BLAS pass {which}")
        seen.blas_ns.append(yardstick.run(world.note_progress))
    if settings.trace:
        seen.traces = {lane: filled(buffer).copy() for lane, buffer in layer.traces.items()}
    return seen


def _progress(iterations: range, show: bool) -> Iterable[int]:
    if not show:
        return iterations
    from tqdm import tqdm

    shown: Iterable[int] = tqdm(iterations, desc="layer and BLAS", unit="call", leave=False)
    return shown
