"""A published row as a simulation: the policy, the world and the quantity; or the reason why it is none.

Routing is the rule's: that of the benchmark if it is known, else even. Hardware comes from the column's text: a
GPU kind that has a preset, and as many ranks as the ep column says, else as many GPUs as the text does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from reference import MoEConfig

from ..drafting.knobs import PolicyKnobs
from ..drafting.rates import Values, fitted_values
from ..policies import make_knobs
from ..simulation import simulate
from ..world.hardware import Hardware
from ..world.machine_files import load_hardware
from ..world.machine_names import gpu_kind, hardware_names
from ..world.precision import precision, with_results
from ..world.scenario import Scenario
from ..world.world import World
from .reasons import known_reason
from .rules import NORMAL, RULES, Rule
from .tables import Row

IMPOSSIBLE = "it cannot be simulated"
DTYPES = {  # of tables: ours
    "bf16": "bfloat16",
    "bf16/fp16": "bfloat16",
    "fp16": "float16",
    "tf32": "float32",
    "fp8": "fp8",
    "fp8 act x fp4 weight": "fp8xfp4",
    "fp8xfp4": "fp8xfp4",
    "mxfp8": "mxfp8",
    "nvfp4": "nvfp4",
}
RESULTS = re.compile(r"\b(\w+) combine\b", re.IGNORECASE)  # in notes: the format in which results travel
GPU_COUNT = re.compile(r"(\d+)\s*x\s*(\d+)?", re.IGNORECASE)  # "8x H100", "8x4 A100"
GATED = {"swiglu": True, "vanilla ffn": False}  # in notes


class Reason(NamedTuple):
    """Why a row is not compared: in general, and what of the row it is."""

    why: str
    what: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One row that can be simulated."""

    row: Row
    rule: Rule
    world: World
    measured: float

    @property
    def knobs(self) -> dict[str, Any]:
        return self.rule.knobs_for(self.row)

    @property
    def rate_key(self) -> tuple[str, str]:
        """(policy, GPU kind): what the fitted rate belongs to."""
        return self.rule.policy, gpu_kind(self.world.hardware.name)

    @property
    def fold(self) -> tuple[str, str]:
        """(source, model): rows that were measured together."""
        config = self.world.config
        gated = "gated" if config.gated else "plain"
        shape = f"{config.hidden} x {config.ffn} {gated}, {config.num_experts} experts, top-{config.num_topk}"
        return self.row.source, shape

    def simulated(self, values: Values | None = None) -> float:
        """The quantity with these values of the fitted knobs, by default those of the policy on the GPU.

        Raises:
            ValueError: the world breaks a rule of the policy.
        """

        def run(policy: str, world: World) -> int:
            own = policy == self.rule.policy
            given, knobs = (values, self.knobs) if own else (None, NORMAL)  # DeepEP's, for speedups
            fitted = fitted_values(policy, world.hardware.name) if given is None else given
            return _time_ns(policy, world, make_knobs(policy, {**fitted, **knobs}))

        return self.rule.measure.of(run, self.rule.policy, self.world)


@lru_cache(maxsize=2**16)
def _time_ns(policy: str, world: World, knobs: PolicyKnobs) -> int:
    """Kept, because tables have several figures of one run, and fits ask for the same again and again."""
    return simulate(policy, world, knobs).timeline.makespan_ns


def sort_rows(rows: Sequence[Row]) -> tuple[list[Case], list[tuple[Row, Reason]]]:
    """The cases, and the other rows with their reasons; together as many as rows."""
    made = [(row, make_case(row)) for row in rows]
    cases = [case for _, case in made if isinstance(case, Case)]
    return cases, [(row, reason) for row, reason in made if isinstance(reason, Reason)]


def make_case(row: Row) -> Case | Reason:
    """The row as a case, by the first rule that matches it."""
    rule = next((rule for rule in RULES if rule.matches(row)), None)
    if rule is None:
        return _no_rule(row)
    if row.unit not in rule.measure.units:
        return Reason("its unit is not one of the quantity's", row.unit or "none")
    if row.value is None or row.value <= 0:
        return Reason("its value is not positive", f"{row.file}, line {row.line}")
    world = _world(row, rule)
    if isinstance(world, Reason):
        return world
    return Case(row=row, rule=rule, world=world, measured=row.value * rule.measure.units[row.unit])


def _no_rule(row: Row) -> Reason:
    why = known_reason(row)
    if why is not None:
        return Reason(why, row.system)
    known = any(re.fullmatch(rule.system, row.system, re.IGNORECASE) for rule in RULES)
    if known:
        return Reason("the quantity is not simulated", row.metric)
    return Reason("no policy stands for the system", row.system)


def _world(row: Row, rule: Rule) -> World | Reason:
    hardware = _hardware(row)
    if isinstance(hardware, Reason):
        return hardware
    numbers = row.dtype.lower() or rule.dtype
    if numbers not in DTYPES:
        return Reason("its number format is not known", numbers or "not stated")
    formats = precision(DTYPES[numbers])
    results = RESULTS.search(row.notes)
    if results is not None and results[1].lower() in DTYPES:
        formats = with_results(formats, DTYPES[results[1].lower()])
    sizes = _sizes(row, rule, hardware.num_gpus)
    if isinstance(sizes, Reason):
        return sizes
    try:
        return _make_world(
            Scenario(
                config=MoEConfig(**sizes),
                hardware=hardware.name,
                precision=formats,
                routing=rule.routing,
                passes=rule.passes,
            )
        )
    except ValueError as error:
        return Reason(IMPOSSIBLE, str(error))


@lru_cache(maxsize=1024)
def _make_world(scenario: Scenario) -> World:
    """One world for all rows that are about the same."""
    return scenario.make()


def _hardware(row: Row) -> Hardware | Reason:
    """The nodes that the row's ranks fill."""
    kinds = sorted(hardware_names(), key=len, reverse=True)
    kind = re.search(rf"(?:\b|x)({'|'.join(kinds)})\b", row.hardware, re.IGNORECASE)
    if kind is None:
        return Reason("no hardware preset", row.hardware or "not stated")
    ranks = _num_ranks(row)
    if ranks is None or ranks != int(ranks):
        return Reason("the number of ranks is not stated, or not whole", row.hardware)
    in_node = load_hardware(kind[1]).gpus_per_node
    nodes, rest = divmod(int(ranks), in_node)
    if nodes and rest:
        return Reason("its ranks do not fill their nodes", f"{ranks:g} ranks")
    try:
        return load_hardware(f"{nodes}x{in_node}x{kind[1]}" if nodes else f"{rest}x{kind[1]}")
    except ValueError as error:
        return Reason(IMPOSSIBLE, str(error))


def _num_ranks(row: Row) -> float | None:
    """GPUs that share the layer: expert times tensor parallelism, else all that the hardware's text counts."""
    if row.ep is not None:
        return row.ep * (row.tp or 1)
    count = GPU_COUNT.match(row.hardware)
    return int(count[1]) * int(count[2] or 1) if count else None


def _sizes(row: Row, rule: Rule, num_ranks: int) -> dict[str, Any] | Reason:
    """The arguments of a `MoEConfig`."""
    columns = {
        "num_tokens": "tokens_per_rank",
        "hidden": "hidden",
        "ffn": "intermediate",
        "num_experts": "experts",
        "num_topk": "topk",
    }
    sizes = {name: getattr(row, column) for name, column in columns.items()} | {"num_ranks": num_ranks}
    sizes |= {name: value for name, value in rule.sizes.items() if sizes[name] is None}
    for name, value in sizes.items():
        if value is None or value != int(value):
            return Reason("a size is not stated, or not whole", columns[name])
    gated = next((gated for words, gated in GATED.items() if words in row.notes.lower()), rule.gated)
    return {name: int(value) for name, value in sizes.items()} | {"gated": gated}
