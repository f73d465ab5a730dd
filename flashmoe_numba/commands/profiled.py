"""`flashmoe compile --run`: a small world on a kernel's linked PTX, without a GPU, and what each kind of task did."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from reference import MoEConfig, Weights, Workload, make_workload, max_rel_error, moe_layer, tolerance
from reference.layout import SAVES
from reference.sizes import weight_bytes

from ..bench.memory import GpuArrays
from ..build.variants import Variant
from ..errors import UsageError
from .plan import describe

if TYPE_CHECKING:
    from ..layer.layer import FlashMoE

SMALL = {"ranks": 2, "tokens": 32, "hidden": 128, "ffn": 128, "experts": 4, "topk": 2}
PROCESSORS, SEED, WORST = 2, 0, 8
MOST_PRODUCTS = 200_000_000  # multiply-adds that the machine makes in a minute or two
MOST_RANKS = 28  # that it can number
ROOM_BYTES = 64 << 20  # beside weights
COLUMNS = (  # name, width, what of a row
    ("activity", "activity", "<9"),
    ("instructions", "instructions", ">12,"),
    ("threads", "threads_per_instruction", ">7.1f"),
    ("barriers", "barriers", ">8,"),
    ("copies", "copies", ">6,"),
    ("products", "products", ">8,"),
    ("atomics", "atomics", ">7,"),
    ("global", "global_requests", ">8,"),
    ("sectors", "sectors_per_request", ">7.2f"),
    ("B/sector", "bytes_per_sector", ">8.1f"),
    ("B/access", "bytes_per_request", ">8.1f"),
    ("shared", "shared_requests", ">8,"),
    ("turns", "turns_per_request", ">5.2f"),
)
LEGEND = (
    "instructions are those of warps, threads those that took part; sectors: of 32 bytes, for each access of a warp to "
    "global memory, with the bytes that it wanted of one and in all; turns: of a bank, for each access to shared memory"
)


def shrink(args: argparse.Namespace) -> None:
    """Sizes that were not given become those of a world that the machine runs in seconds."""
    for flag, size in SMALL.items():
        if getattr(args, flag) is None:
            setattr(args, flag, size)


def check_sizes(config: MoEConfig) -> None:
    """Raise a UsageError if the machine would take too long, or could not hold it."""
    matrices = config.num_topk * config.expert_kind.num_matrices
    per_token = config.hidden * (matrices * config.ffn + config.num_experts)
    products = config.num_ranks * config.num_tokens * per_token
    if products > MOST_PRODUCTS:
        rule = f"sizes must have at most {MOST_PRODUCTS:,} multiply-adds, of which every instruction is executed"
        raise UsageError(
            f"argument --run: {rule}; these sizes have {products:,}: give fewer --tokens, or less --hidden"
        )
    if config.num_ranks > MOST_RANKS:
        raise UsageError(f"argument --run: --ranks must be at most {MOST_RANKS}, got {config.num_ranks}")


def run_variant(variant: Variant, config: MoEConfig) -> dict[str, Any]:
    """One call of a layer on this kernel, and for one of gradients its backward: a JSON object, whose "failures" say
    what was wrong.
    """
    from ..layer.layer import FlashMoE
    from ..ptx.faults import PtxFault
    from ..ptx.profile import ProfilingMachine
    from ..ptx.simulated import simulated_gpu

    config = _fitting(variant, config)
    weights, workload = Weights.random(config, SEED), make_workload("uniform", config, None, SEED)
    settings: dict[str, Any] = dict(backend="cuda", num_processors=PROCESSORS, tf32=_is_tf32(variant))
    settings["save"] = SAVES[0] if variant.backward else None
    blocks = config.num_ranks * (PROCESSORS + 1)
    memory_bytes = ROOM_BYTES + (8 if variant.backward else 2) * config.num_ranks * weight_bytes(config)
    how: dict[str, Any] = dict(seed=SEED, blocks_per_gpu=PROCESSORS + 1, multiprocessors=min(56, blocks))
    with simulated_gpu(variant.architecture, **how, memory_bytes=memory_bytes, profile=variant) as gpu:
        machine, began = gpu.machine, time.perf_counter()
        assert isinstance(machine, ProfilingMachine)
        try:
            with FlashMoE(config, weights, **settings) as layer:
                judge = _judge_backward if variant.backward else _judge
                failures = judge(layer, weights, workload, _is_tf32(variant))
        except PtxFault as fault:
            failures = [str(fault)]
        seconds = time.perf_counter() - began
        return {
            "config": asdict(config), "num_processors": PROCESSORS, "steps": machine.steps, "seconds": seconds,
            "activities": machine.rows(), "most_waste": machine.most_waste(WORST), "failures": failures,
        }  # fmt: skip


def _fitting(variant: Variant, config: MoEConfig) -> MoEConfig:
    """The same layer with tiles for which this kernel is chosen."""
    tile_n = 128 if variant.tensor_cores else min(config.tile_n, 64)
    return replace(config, dtype=variant.dtype, tile_n=tile_n)


def _is_tf32(variant: Variant) -> bool:
    return variant.tensor_cores and variant.dtype == "float32"


def _judge(layer: FlashMoE, weights: Weights, workload: Workload, tf32: bool) -> list[str]:
    """What is wrong with a call, against the oracle with the same routing; TF32 has float16's ten bits of mantissa."""
    memory = GpuArrays(layer.config)
    y = [memory.to_host(part) for part in layer([memory.to_device(part) for part in workload.x])]
    layer.synchronize()
    idx, factors = [part.topk_idx for part in layer.routing], [part.topk_weights for part in layer.routing]
    error = max_rel_error(y, moe_layer(workload.x, weights, layer.config, topk_idx=idx, topk_weights=factors))
    limit = tolerance(replace(layer.config, dtype="float16") if tf32 else layer.config)
    return [] if error <= limit else [f"max_rel_error must be at most {limit:.2e}, got {error:.2e}"]


def _judge_backward(layer: FlashMoE, weights: Weights, workload: Workload, tf32: bool) -> list[str]:
    """The same of gradients, each by its own bound."""
    from ..bench.backward import of_ranks, random_gradients
    from ..bench.check_gradients import check_gradients

    memory = GpuArrays(layer.config)
    y, saved = layer.forward([memory.to_device(part) for part in workload.x])
    dy, routing = random_gradients([memory.to_host(part) for part in y], 0, SEED), layer.routing
    gradients = layer.backward(saved, [memory.to_device(part) for part in dy])
    layer.synchronize()
    found = of_ranks(gradients, list, memory.to_host)
    return check_gradients(layer.config, weights, workload, routing, dy, found, tf32).failures


def table(variant: Variant, run: dict[str, Any]) -> Iterator[str]:
    """For people."""
    config = MoEConfig(**run["config"])
    yield ""
    judged = "not as it should be" if run["failures"] else "equal to the oracle"
    yield f"{variant.name} on {config.num_ranks} ranks of {PROCESSORS + 1} blocks, {describe(config)}: {judged}"
    yield f"{run['steps'] / 1e6:.1f} million instructions of threads in {run['seconds']:.1f} s; {LEGEND}"
    yield "  ".join(f"{name:{width.rstrip(',f').split('.')[0]}}" for name, _, width in COLUMNS)
    for row in run["activities"]:
        yield "  ".join(_cell(row[field], width) for _, field, width in COLUMNS)
    yield (
        "accesses to global memory that touch more sectors than their bytes need:"
        if run["most_waste"]
        else ("no access to global memory touches more sectors than its bytes need")
    )
    for line in run["most_waste"]:
        counts = f"{line['requests']:,} of {line['sectors_per_request']:.1f}, {line['excess_per_request']:.1f} too many"
        yield f"  {counts}: PTX line {line['line']}: {line['text']}"


def _cell(value: Any, width: str) -> str:
    blank = width.rstrip(",f").split(".")[0]
    return f"{'':{blank}}" if value is None or value == 0 else f"{value:{width}}"
