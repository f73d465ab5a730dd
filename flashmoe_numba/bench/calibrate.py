"""Measure this machine with the kernel's own trace: how fast its blocks multiply, store, signal and combine.

Two kinds of calls are made. In most the routing comes from outside and gives every packet the same number of rows, at
most one row tile, so that slices of one kind are alike; depths and rows vary from probe to probe. In the others the
kernel gates for itself. Each figure is a median over slices, so a slice that another program interrupted does not
count; those of tiles are then fitted by

    time = latency + operations / rate + bytes read / bandwidth

with the relative errors of all tiles alike. The bytes are those of the tile's weights and rows: on a CPU nothing copies
them ahead, so their time adds to that of the products.

Leaves out: activations, which take a time per element of a GEMM0 tile and so count for more where products are short
(at a depth of 384 a tile of 64 rows took 13 % longer than a fit said that knows nothing of it): the probes' are long.
Nor does it see how rates change with the number of blocks at work, or what the OS block does beside RECEIVE, of which
the trace keeps no record. Ranks are threads of this process, or virtual ranks of one GPU; it has not run on one yet.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from reference import COMBINE, DISPATCH, GATE, GEMM0, GEMM1, MoEConfig, Weights, make_workload
from reference.task_kinds import RECEIVE
from reference.traces import Slice

from ..layer.layer import FlashMoE
from ..seeing.trace import decode
from .measure import SETTLE_S
from .memory import make_memory

ROWS = (4, 16, 32, 64, 128)  # of each packet: the ladder of `MoEConfig`, and next to none, where reading is most of it
DEPTHS = ((768, 2048), (1536, 640))  # hidden and ffn, depths of GEMM0 and GEMM1: not short, see "Leaves out"
EXPERTS_PER_RANK = 8
GATE_TOKENS, GATE_EXPERTS = 512, 16


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to run: see `FlashMoE`; `repeats` calls of each probe are measured, after one that warms up."""

    num_ranks: int = 1
    num_processors: int | None = None
    backend: str = "cpu"
    dtype: str = "float32"
    repeats: int = 5


class Call(NamedTuple):
    """One traced call. `rows` are those of every packet, None where the kernel gated for itself."""

    config: MoEConfig
    rows: int | None
    records: list[Slice]
    wall_ns: int


@dataclass(frozen=True, kw_only=True)
class Rates:
    """One block's speed. Times are ns; rates are operations or bytes per ns, which is GFLOP/s or GB/s.

    Args:
        processors: blocks of a rank beside its OS block.
        gflops: of a tile's products, whole units of rows counted.
        tile_latency_ns: fixed part of a tile.
        read_gbps: weights and rows that a tile reads; None where their reading hides behind the products.
        fit_error: the largest relative error of the fit over the kinds of tiles.
        put_gbps: rows stored to another rank, None with one rank.
        move_gbps: rows stored within a rank.
        combine_gbps: results read and sums written.
        signal_ns: from the end of a DISPATCH to the RECEIVE of its packet, where the OS block had nothing else to do;
            0 if it always had.
        receive_ns: RECEIVE of a packet.
        gate_ns: GATE of a whole token block over `GATE_EXPERTS` experts.
        outside_ns: what a call takes outside of the kernel, from its first slice to its last.
    """

    processors: int
    gflops: float
    tile_latency_ns: float
    read_gbps: float | None
    fit_error: float
    put_gbps: float | None
    move_gbps: float
    combine_gbps: float
    signal_ns: float
    receive_ns: float
    gate_ns: float
    outside_ns: float


# ---- calls


def calibrate(settings: Settings) -> Rates:
    """Run the probes and derive the rates; takes seconds.

    Raises:
        TypeError, ValueError, FlashMoEError: see `FlashMoE`.
    """
    calls: list[Call] = []
    for hidden, ffn in DEPTHS:
        calls += _even_calls(settings, hidden, ffn)
    processors, gated = _gated_calls(settings)
    return rates([*calls, *gated], processors, row_unit(settings.backend))


def row_unit(backend: str) -> int | None:
    """Rows that are multiplied together whatever a tile has: on CPUs each by itself, on GPUs (None) all of them."""
    return 1 if backend == "cpu" else None


def _even_calls(settings: Settings, hidden: int, ffn: int) -> Iterator[Call]:
    """Calls of one layer with packets of each height."""
    experts = EXPERTS_PER_RANK * settings.num_ranks
    with _layer(settings, max(ROWS) * experts, hidden, ffn, experts) as layer:
        probes = [(rows, *_even_tokens(layer.config, rows, settings.backend)) for rows in ROWS]
        for repeat, (rows, x, routing) in product(range(settings.repeats + 1), probes):
            call = _call(layer, x, routing, rows)
            if repeat:  # the first one warms up
                yield call


def _gated_calls(settings: Settings) -> tuple[int, list[Call]]:
    """Blocks of a rank beside its OS block, and calls without a routing from outside."""
    with _layer(settings, GATE_TOKENS, *DEPTHS[0], GATE_EXPERTS * settings.num_ranks) as layer:
        x = _tokens(layer.config, GATE_TOKENS, settings.backend)
        calls = [_call(layer, x, {}, None) for _ in range(settings.repeats + 1)]
        return layer.num_processors, calls[1:]


def _layer(settings: Settings, tokens: int, hidden: int, ffn: int, experts: int) -> FlashMoE:
    config = MoEConfig(
        num_ranks=settings.num_ranks,
        num_tokens=tokens,
        hidden=hidden,
        ffn=ffn,
        num_experts=experts,
        num_topk=1,
        activation="silu",
        dtype=settings.dtype,
    )
    weights = Weights.random(config)
    how: dict[str, Any] = dict(num_processors=settings.num_processors, trace=True, packing="none")  # a tile per packet
    return FlashMoE(config, weights, backend=settings.backend, **how)


def _tokens(config: MoEConfig, tokens: int, backend: str) -> list[Any]:
    """Of each rank."""
    memory = make_memory(backend, config)
    return [memory.to_device(part) for part in make_workload("uniform", config, tokens).x]


def _even_tokens(config: MoEConfig, rows: int, backend: str) -> tuple[list[Any], dict[str, list[np.ndarray]]]:
    """Tokens of each rank, and a routing that sends `rows` of them to every expert."""
    tokens = rows * config.num_experts
    expert = np.arange(tokens, dtype=np.int32)[:, None] % config.num_experts
    ones = np.ones((tokens, 1), config.accumulator)
    routing = {"topk_idx": [expert] * config.num_ranks, "topk_weights": [ones] * config.num_ranks}
    return _tokens(config, tokens, backend), routing


def _call(layer: FlashMoE, x: list[Any], routing: dict[str, Any], rows: int | None) -> Call:
    time.sleep(SETTLE_S / 10)
    start = time.perf_counter_ns()
    layer(x, **routing)
    layer.synchronize()
    wall_ns = time.perf_counter_ns() - start
    return Call(layer.config, rows, decode(layer.traces), wall_ns)


# ---- rates


def rates(calls: Sequence[Call], processors: int, unit: int | None) -> Rates:
    """What the slices of these calls say.

    Args:
        calls: at least one with even packets, and one that gated for itself.
        unit: rows that are multiplied together, see `row_unit`.
    """
    even = [call for call in calls if call.rows is not None]
    gated = [call for call in calls if call.rows is None]
    latency, per_flop, per_byte, error = fit_tiles(list(_tiles(even, unit)))
    puts = list(_gbps(even, _even_rows, lambda record: record.kind == DISPATCH and record.peer != record.rank))
    moves = _gbps(even, _even_rows, lambda record: record.kind == DISPATCH and record.peer == record.rank)
    signals = [ns for call in calls for ns in _signals(call.records)]
    return Rates(
        processors=processors,
        gflops=1 / per_flop,
        tile_latency_ns=latency,
        read_gbps=1 / per_byte if per_byte else None,
        fit_error=error,
        put_gbps=median(puts) if puts else None,
        move_gbps=median(moves),
        combine_gbps=median(_gbps(even, _combined_rows, lambda record: record.kind == COMBINE)),
        signal_ns=median(signals) if signals else 0.0,
        receive_ns=median(_durations(calls, RECEIVE)),
        gate_ns=median(_durations(gated, GATE)),
        outside_ns=median(call.wall_ns - _span_ns(call.records) for call in gated),
    )


class Tile(NamedTuple):
    """A kind of tile: operations, bytes that it reads, and its median time."""

    flops: float
    nbytes: float
    time_ns: float


def _tiles(calls: Iterable[Call], unit: int | None) -> Iterator[Tile]:
    """One per depth, width, rows and computed rows, of packets of one row tile. What pads a tile is not read."""
    times: dict[tuple[int, int, int, int, int], list[int]] = defaultdict(list)
    for config, rows, records, _ in calls:
        shapes = {GEMM0: (config.hidden, config.ffn), GEMM1: (config.ffn, config.hidden)}
        for record in records:
            if record.kind in shapes and rows is not None:
                depth, width = shapes[record.kind]
                columns = min(config.tile_n, width - record.n * config.tile_n)
                computed = max(rows, config.tile_m_min) if unit is None else -(-rows // unit) * unit
                key = (depth, columns, rows, computed, config.format.num_bytes)
                times[key].append(record.end_ns - record.start_ns)
    for (depth, columns, rows, computed, item), durations in times.items():
        yield Tile(2 * depth * columns * computed, item * depth * (columns + rows), median(durations))


def fit_tiles(tiles: Sequence[Tile]) -> tuple[float, float, float, float]:
    """Latency (ns), ns per operation, ns per byte, none of them negative, and the largest relative error.

    Raises:
        ValueError: the times do not grow with the operations.
    """
    columns = {"latency": [1.0] * len(tiles), "flops": [t.flops for t in tiles], "bytes": [t.nbytes for t in tiles]}
    times = np.array([tile.time_ns for tile in tiles])
    chosen = list(columns)
    while True:
        design = np.array([columns[name] for name in chosen]).T / times[:, None]
        scale = design.max(axis=0)
        found = np.linalg.lstsq(design / scale, np.ones(len(tiles)), rcond=None)[0] / scale
        if (found >= 0).all():
            break
        chosen.remove(chosen[int((found * scale).argmin())])
    result = dict(zip(chosen, found.tolist(), strict=True))
    if result.get("flops", 0) <= 0:
        raise ValueError("the times of tiles must grow with their operations: measure on a machine with less to do")
    error = float(np.abs(design @ found - 1).max())
    return result.get("latency", 0.0), result["flops"], result.get("bytes", 0.0), error


def _gbps(calls: Iterable[Call], rows_of: Callable[[Call], int], chosen: Callable[[Slice], bool]) -> Iterator[float]:
    """Of the chosen slices, each of which moves so many rows of its call."""
    for call in calls:
        nbytes = rows_of(call) * call.config.hidden * call.config.format.num_bytes
        for record in filter(chosen, call.records):
            yield nbytes / max(1, record.end_ns - record.start_ns)


def _even_rows(call: Call) -> int:
    return call.rows or 0


def _combined_rows(call: Call) -> int:
    """Of whole token blocks: with one choice per token as many rows are read as written."""
    return 2 * call.config.token_block


def _signals(records: Sequence[Slice]) -> Iterator[int]:
    """How late each packet was seen that found its owner's OS block idle: the gate open, and all before received."""
    sent = {(r.rank, r.peer, r.expert): r.end_ns for r in records if r.kind == DISPATCH}
    gate: dict[int, int] = defaultdict(int)
    for record in records:
        if record.kind == GATE:
            gate[record.rank] = max(gate[record.rank], record.end_ns)
    receives = sorted((r for r in records if r.kind == RECEIVE), key=lambda r: (r.rank, r.start_ns))
    for before, record in zip([None, *receives], receives, strict=False):
        idle_ns = before.end_ns if before is not None and before.rank == record.rank else gate[record.rank]
        signal_ns = sent[record.peer, record.rank, record.expert]
        if signal_ns >= idle_ns:
            yield max(1, record.start_ns - signal_ns)


def _durations(calls: Iterable[Call], kind: int) -> Iterator[int]:
    return (r.end_ns - r.start_ns for call in calls for r in call.records if r.kind == kind)


def _span_ns(records: Sequence[Slice]) -> int:
    return max(r.end_ns for r in records) - min(r.start_ns for r in records)


# ---- table


def table(found: Rates) -> Iterator[str]:
    """The lines that people read."""
    reading = "hidden behind products" if found.read_gbps is None else f"{found.read_gbps:.1f} GB/s"
    put = "no other rank" if found.put_gbps is None else f"{found.put_gbps:.1f} GB/s"
    rows = {
        "tile products": f"{found.gflops:.1f} GFLOP/s",
        "tile reading": reading,
        "tile latency": _us(found.tile_latency_ns),
        "fit of tiles": f"largest error {found.fit_error:.1%}",
        "put": put,
        "move": f"{found.move_gbps:.1f} GB/s",
        "combine": f"{found.combine_gbps:.1f} GB/s",
        "signal": f"{_us(found.signal_ns)} until an idle OS block sees a packet",
        "receive": _us(found.receive_ns),
        "gate": _us(found.gate_ns),
        "launch": f"{_us(found.outside_ns)} of a call outside of the kernel",
    }
    yield from (f"{name:14}{text}" for name, text in rows.items())


def _us(ns: float) -> str:
    return f"{ns / 1000:.2f} us"
