"""Which policy stands for a published system, and what of its simulation stands beside the figure.

One table, read from the top: the first rule whose system and metric match a row is the row's. A row that none matches
is not compared. Knobs say how the system was built or measured where its source says so, never what would fit it best.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..routing import make_routing
from ..simulate import Simulation
from ..world import World
from .tables import Row

Run = Callable[[World], Simulation]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A quantity in `unit`; `units` are those of tables, with what they are times ours."""

    name: str
    unit: str
    units: Mapping[str, float]
    of: Callable[[Run, World], float]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Args:
    system, metric: patterns that must match all of the row's text; case does not matter.
    gated, dtype, sizes: of rows that do not say it; sizes by the names of `MoEConfig`.
    fitted: whether the rate of (policy, GPU) is fitted to these rows. If not, `why_not` says why.
    """

    system: str
    metric: str
    policy: str
    measure: Measure
    knobs: Mapping[str, Any] = field(default_factory=dict)
    gated: bool = False
    dtype: str = ""
    sizes: Mapping[str, int] = field(default_factory=dict)
    why_not: str = ""

    @property
    def fitted(self) -> bool:
        return not self.why_not

    def matches(self, row: Row) -> bool:
        pairs = ((self.system, row.system), (self.metric, row.metric))
        return all(re.fullmatch(pattern, text, re.IGNORECASE) for pattern, text in pairs)


def _latency(run: Run, world: World) -> float:
    return run(world).latency_us


def _weak_scaling(run: Run, world: World) -> float:
    """T(2 ranks) over T(all ranks), with the same tokens on each rank and the same experts in all."""
    config = replace(world.config, num_ranks=2)
    pair = replace(world, config=config, routing=make_routing(world.routing.name, config))
    return 100 * run(pair).latency_us / run(world).latency_us


LATENCY = Measure(name="latency", unit="us", units={"us": 1, "ms": 1000}, of=_latency)
SCALING = Measure(name="T(2) / T(N)", unit="%", units={"%": 1}, of=_weak_scaling)

OLDER = "an older version, with other tiles, measured in tf32"
OFF = "10 to 25 times off any model"

V012 = {"gate": False, "tile_m": 128}  # its C++ benchmark leaves the gate out
PAPER = {"tile_n": 64}  # tiles of 128 x 64
MEGATRON = r"Megatron(-LM|-TE|-CUTLASS)?"
COMET = r"COMET|flux\(COMET\)"

RULES = (
    Rule(system="FlashMoE", metric="layer_fwd_latency_v012", policy="flashmoe", measure=LATENCY, knobs=V012),
    Rule(system=MEGATRON, metric="layer_fwd_latency_v012", policy="bulk", measure=LATENCY),
    Rule(system=COMET, metric="layer_fwd_latency_v012", policy="comet", measure=LATENCY),
    Rule(
        system="FlashMoE",
        metric="layer_fwd_latency",
        policy="flashmoe",
        measure=LATENCY,
        knobs=PAPER,
        why_not=OLDER,
    ),
    Rule(system=MEGATRON, metric="layer_fwd_latency", policy="bulk", measure=LATENCY, why_not=OFF),
    Rule(system="FasterMoE", metric="layer_fwd_latency", policy="fastermoe", measure=LATENCY, why_not=OFF),
    Rule(system=COMET, metric="layer_fwd_latency", policy="comet", measure=LATENCY, why_not=OFF),
    Rule(
        system="FlashMoE",
        metric="overlap_efficiency_T2_over_TN",
        policy="flashmoe",
        measure=SCALING,
        knobs=PAPER,
        why_not=OLDER,
    ),
    Rule(system=MEGATRON, metric="overlap_efficiency_T2_over_TN", policy="bulk", measure=SCALING, why_not=OFF),
    Rule(system="FasterMoE", metric="overlap_efficiency_T2_over_TN", policy="fastermoe", measure=SCALING, why_not=OFF),
)
