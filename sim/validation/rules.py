"""Which policy stands for a published system, and what of its simulation stands beside the figure.

One table, read from the top: the first rule whose system and metric match a row is the row's. A row that none matches
is not compared. Knobs say how the system was built or measured where its source says so, never what would fit it best.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from ..world.routing import make_routing
from ..world.world import BACKWARD, FORWARD, FORWARDS, World
from .published import bottleneck_gbps, megamoe_columns
from .tables import Row

Run = Callable[[str, World], int]  # the time of a policy in a world, in nanoseconds


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A quantity in `unit`; `units` are those of tables, with what they are times ours."""

    name: str
    unit: str
    units: Mapping[str, float]
    of: Callable[[Run, str, World], float]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Args:
    system, metric: patterns that must match all of the row's text; case does not matter. A named group of `metric` is
        the knob of that name.
    routing: that of the benchmark, where its public code says it.
    columns: knobs whose value a column of the row has.
    gated, dtype, sizes: of rows that do not say it; sizes by the names of `MoEConfig`.
    passes: what was measured, one of `world.PASSES`.
    fitted: whether the rate of (policy, GPU) is fitted to these rows. If not, `why_not` says why.
    """

    system: str
    metric: str
    policy: str
    measure: Measure
    knobs: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    formats: str = ".*"
    routing: str = "even"
    gated: bool = False
    dtype: str = ""
    sizes: Mapping[str, int] = field(default_factory=dict)
    passes: str = FORWARD
    why_not: str = ""

    @property
    def fitted(self) -> bool:
        return not self.why_not

    def matches(self, row: Row) -> bool:
        pairs = ((self.system, row.system), (self.metric, row.metric), (self.formats, row.dtype))
        return all(re.fullmatch(pattern, text, re.IGNORECASE) for pattern, text in pairs)

    def knobs_for(self, row: Row) -> dict[str, Any]:
        """The knobs of a row; a column whose cell is empty leaves the policy's default."""
        match = re.fullmatch(self.metric, row.metric, re.IGNORECASE)
        cells = match.groupdict() if match else {}
        cells |= {knob: getattr(row, column) for knob, column in self.columns.items()}
        return {**self.knobs, **{knob: int(value) for knob, value in cells.items() if value is not None}}


def _latency(run: Run, policy: str, world: World) -> float:
    return run(policy, world) / 1000


def _weak_scaling(run: Run, policy: str, world: World) -> float:
    """T(2 ranks) over T(all ranks), with the same tokens on each rank and the same experts in all."""
    config = replace(world.config, num_ranks=2)
    pair = replace(world, config=config, routing=make_routing(world.routing.name, config))
    return 100 * run(policy, pair) / run(policy, world)


def _tflops(run: Run, policy: str, world: World) -> float:
    """Products of the real rows, of all ranks, per GPU; of a backward twice as many."""
    rows = world.routing.counts.sum() / world.num_ranks
    flops = FORWARDS[world.passes] * 2 * rows * world.config.hidden * (world.up_columns + world.config.ffn)
    return float(flops / run(policy, world) / 1e3)


def _bottleneck(stage: str, run: Run, policy: str, world: World) -> float:
    return bottleneck_gbps(world, stage, run(policy, world))


def _column(name: str, run: Run, policy: str, world: World) -> float:
    return megamoe_columns(world, run(policy, world) / 1000)[name]


def _speedup(run: Run, policy: str, world: World) -> float:
    """Over DeepEP with DeepGEMM in the same world."""
    return run("deepep", world) / run(policy, world)


def _rate(name: str, unit: str, of: Callable[[Run, str, World], float]) -> Measure:
    return Measure(name=name, unit=unit, units={unit: 1}, of=of)


LATENCY = Measure(name="latency", unit="us", units={"us": 1, "ms": 1000}, of=_latency)
SCALING = _rate("T(2) / T(N)", "%", _weak_scaling)
THROUGHPUT = _rate("throughput", "TFLOPS", _tflops)
DISPATCH = _rate("bottleneck bandwidth of dispatch", "GB/s", partial(_bottleneck, "dispatch"))
COMBINE = _rate("bottleneck bandwidth of combine", "GB/s", partial(_bottleneck, "combine"))
SPEEDUP = _rate("speedup over DeepEP + DeepGEMM", "x", _speedup)

# Why rows are shown and not fitted.
OLDER = "an older version of the code, in tf32"
OFF = "10 to 25 times off any model"
NO_PRODUCT = "there is no product in it"
OTHER_CODE = "other kernels with the same way of rows, which they move by TMA"
OF_FORWARDS = "rates are those of forwards"
SAME_TIME = "it follows from the latency"

PER_SOURCE = {"packing": "per_source", "scheduler": "os_block"}  # as in all published versions
V012 = PER_SOURCE | {"gate": False}  # its benchmark leaves the gate out
PAPER = PER_SOURCE | {"tile_n": 64, "blocks_per_sm": 2}
CUTLASS = {"num_ops": 85}  # as the paper counted them

MEGA = {"gate": False, "cuda_graph": True}  # a routing is there, and kernels are timed back to back
CUTEDSL = "FlashInfer CuTeDSL MegaMoE"
PADDED = {"pad": True}
PAIRED = {"tile_m": 256, "tile_n": 128, "cluster": 2}  # by its public configurations: two SMs multiply 256 x 256
MEGATRON = r"Megatron(-LM|-TE|-CUTLASS)?"
COMET = r"COMET|flux\(COMET\)"
NORMAL = {"mode": "normal"}
LOW_LATENCY = {"mode": "low_latency", "token_block": 1}  # its combine gives a token to a multiprocessor

# What several rules have in common.
layer_v012 = partial(Rule, metric="layer_fwd_latency_v012", measure=LATENCY)
layer = partial(Rule, metric="layer_fwd_latency", measure=LATENCY)
overlap = partial(Rule, metric="overlap_efficiency_T2_over_TN", measure=SCALING)
# The tests of DeepEP and DeepGEMM, which measure, take the top k of random numbers.
deepgemm = partial(Rule, metric="layer_latency", measure=LATENCY, routing="uniform", gated=True)
megamoe = partial(deepgemm, system="MegaMoE", policy="megamoe", knobs=MEGA)
flashinfer = partial(megamoe, metric=r"(layer|kernel)_latency")
deepep = partial(Rule, policy="deepep", routing="uniform", sizes={"ffn": 2048}, why_not=NO_PRODUCT)  # rows only move

RULES = (
    layer_v012(system="FlashMoE", policy="flashmoe", knobs=V012),
    layer_v012(system=MEGATRON, policy="bulk"),
    layer_v012(system=COMET, policy="comet", knobs={"gate": False}),
    layer(system="FlashMoE", policy="flashmoe", knobs=PAPER, why_not=OLDER),
    layer(system="Megatron-CUTLASS", policy="bulk", knobs=CUTLASS, why_not=OFF),
    layer(system=MEGATRON, policy="bulk", why_not=OFF),
    layer(system="FasterMoE", policy="fastermoe", why_not=OFF),
    layer(system=COMET, policy="comet", why_not=OFF),
    overlap(system="FlashMoE", policy="flashmoe", knobs=PAPER, why_not=OLDER),
    overlap(system=MEGATRON, policy="bulk", why_not=OFF),
    overlap(system="FasterMoE", policy="fastermoe", why_not=OFF),
    Rule(
        system=COMET,
        metric="moe_layer0_ag_scatter_gemm",
        policy="comet",
        measure=LATENCY,
        knobs={"stages": "layer0"},
        columns={"tensor_parallel": "tp"},
    ),
    megamoe(system=r"MegaMoE.*split.*", knobs=MEGA | {"split": True}),
    megamoe(system=r"MegaMoE.*\bPR 36\b.*", knobs=MEGA | PADDED),  # before its products of few rows were swapped
    megamoe(system=r"MegaMoE.*"),
    flashinfer(system=rf"{CUTEDSL} \+in-kernel fc2 reduce", formats="nvfp4", knobs=MEGA | PADDED | {"reduce": "add"}),
    # rows and columns swapped, tiles tuned for each number of tokens
    flashinfer(system=CUTEDSL, formats="nvfp4", knobs=MEGA | PADDED),
    flashinfer(system=CUTEDSL, formats="bf16|mxfp8", knobs=MEGA | PAIRED),
    flashinfer(system=r"DeepGEMM MegaMoE \(via FlashInfer moe_ep\)"),
    *(
        megamoe(metric=name, measure=_rate(name, unit, partial(_column, name)), why_not=SAME_TIME)
        for name, unit in (("compute_throughput", "TFLOPS"), ("hbm_bw", "GB/s"), ("nvlink_bw", "GB/s"))
    ),
    megamoe(metric=r"speedup_vs_DeepEP\+DeepGEMM", measure=SPEEDUP, why_not=SAME_TIME),
    deepgemm(system=r"DeepEP( high-throughput)? \+ DeepGEMM( \(baseline.*\))?", policy="deepep", knobs=NORMAL),
    deepgemm(system=r"DeepEP low-latency \+ DeepGEMM", policy="deepep", knobs=LOW_LATENCY),
    *(
        deepep(
            system=r"DeepEP V1 normal.*",
            metric=f"{stage}_bottleneck_bw_(NVLink|RDMA)",
            measure=measure,
            knobs=NORMAL | {"stages": stage},
            dtype="fp8",
        )
        for stage, measure in (("dispatch", DISPATCH), ("combine", COMBINE))
    ),
    *(  # their "algorithm bandwidth" has the bytes of DeepEP's bottleneck bandwidth (tests/test_hybrid_ep.py)
        deepep(
            system=system,
            metric=f"{stage}_algo_bw_(torch_api|kernel_only)_(?P<comm_sms>[0-9]+)sms",
            measure=measure,
            knobs=NORMAL | {"stages": stage},
            why_not=why_not,
        )
        for system, why_not in ((r"DeepEP \(V1\) as HybridEP baseline", NO_PRODUCT), ("DeepEP HybridEP", OTHER_CODE))
        for stage, measure in (("dispatch", DISPATCH), ("combine", COMBINE))
    ),
    *(
        deepep(
            system=r"DeepEP V1 low-latency \(NVLink allowed.*",
            metric=f"ll_{stage}_latency",
            measure=LATENCY,
            knobs={**LOW_LATENCY, "stages": stage},
        )
        for stage in ("dispatch", "combine")
    ),
    Rule(system="SonicMoE", metric="moe_fwd_throughput", policy="sonic", measure=THROUGHPUT),
    Rule(
        system="SonicMoE",
        metric="moe_bwd_throughput",
        policy="sonic",
        measure=_rate("throughput of the backward", "TFLOPS", _tflops),
        passes=BACKWARD,
        why_not=OF_FORWARDS,
    ),
)
