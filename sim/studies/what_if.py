"""What would make a simulation shorter: one change at a time of the machine, the policy's knobs or the routing.

Every change is simulated. A gain is the share of the time that it saves, alone; gains do not add up. A faster part that
makes the whole slower is no mistake: a list schedule can be longer with more slots (R. L. Graham, 1969), because tasks
then come in another order. Such anomalies are said, not hidden. Leaves out: what a
change costs, knobs that are chosen by the policy (None), and those in `NOT_CHOICES`, which are no schedule's to choose.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..drafting.knobs import PolicyKnobs
from ..simulation import Simulation, simulate
from ..world.hardware import Hardware
from ..world.placement import balance
from ..world.routing import SimRouting, make_routing
from ..world.world import World

WORTH = 0.01  # a gain below it is noise of the model
NOT_CHOICES = {
    "rate",  # fitted to measurements
    *("gate", "stages", "save_up", "zero_share", "dense_ffn"),  # what is computed, and not how
    "save",  # what memory allows
    *("zero_seed", "straggler_seed"),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Change:
    """What is different, in words, and the world and the knobs with it; `faster`: nothing but a part of the machine."""

    name: str
    world: World
    knobs: PolicyKnobs
    faster: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Gain:
    """A change, its latency, and the share that it saves: below 0 if it makes the whole slower."""

    change: Change
    latency_us: float
    gain: float


def changes(simulation: Simulation) -> list[Change]:
    """All single changes that can be: other sizes of the machine, knobs and routings that do not fit are left out."""
    world, knobs = simulation.world, simulation.knobs
    found = []
    for name, hardware in _machines(world.hardware):
        found += _fitting(name, simulation, faster=True, hardware=hardware)
    for name, knob in _knobs(knobs):
        found += _fitting(name, simulation, knob)
    for name, routing in _routings(world):
        found += _fitting(name, simulation, routing=routing)
    return found


def gains(simulation: Simulation, candidates: Iterable[Change]) -> list[Gain]:
    """All changes simulated, by their gain."""
    before = simulation.timeline.makespan_ns
    found = []
    for change in candidates:
        try:
            after = simulate(simulation.policy, change.world, change.knobs).timeline.makespan_ns
        except ValueError:  # a knob that does not go with this world
            continue
        found.append(Gain(change=change, latency_us=after / 1000, gain=1 - after / before))
    return sorted(found, key=lambda gain: -gain.gain)


def _fitting(
    name: str, simulation: Simulation, knob: Mapping[str, Any] | None = None, faster: bool = False, **parts: Any
) -> list[Change]:
    try:
        world = replace(simulation.world, **parts) if parts else simulation.world
        return [Change(name=name, world=world, knobs=replace(simulation.knobs, **(knob or {})), faster=faster)]
    except ValueError:
        return []


def _machines(hardware: Hardware) -> Iterator[tuple[str, Hardware]]:
    def times(factor: float, *names: str) -> Hardware:
        values = {name: getattr(hardware, name) for name in names}
        return replace(hardware, **{name: type(value)(value * factor) for name, value in values.items()})

    twice = {mma_type: 2 * rate for mma_type, rate in hardware.tflops.items()}
    both = ["nic_gbps"] if hardware.is_one_link else []
    yield f"{hardware.node_link} twice as fast", times(2, "nvlink_gbps", *both)
    if hardware.num_nodes > 1 and not both:
        yield f"{hardware.network_link}s twice as fast", times(2, "nic_gbps")
    yield "memory (HBM) twice as fast", times(2, "hbm_gbps")
    yield "tensor cores twice as fast", replace(hardware, tflops=twice)
    yield "launches in half the time", times(0.5, "launch_ns", "graph_launch_ns", "host_sync_ns")
    yield "barriers in half the time", times(0.5, "barrier_ns")
    yield "twice the SMs, with their tensor cores and L2 bandwidth", replace(times(2, "sms", "l2_gbps"), tflops=twice)


def _knobs(knobs: PolicyKnobs) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, value in vars(knobs).items():
        if value is None or name in NOT_CHOICES:
            continue
        for other in _others(value, knobs.choices.get(name, ())):
            yield f"knob {name} = {other:g}" if isinstance(other, float) else f"knob {name} = {other}", {name: other}


def _others(value: Any, choices: tuple[str, ...]) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, str):
        return [choice for choice in choices if choice != value]
    return [other for other in (type(value)(value / 2), value * 2) if other != value]


def _routings(world: World) -> Iterator[tuple[str, SimRouting]]:
    if world.routing.name != "even":
        even = make_routing("even", world.config)
        more = int(even.counts.sum() - world.routing.counts.sum())
        yield "even routing" + (f", with {more:+,} rows" if more else ""), even
    for replicas in (0, world.num_ranks) if world.num_ranks > 1 else ():
        name = f"experts placed by load, {replicas} copies of busy ones" if replicas else "experts placed by load"
        try:
            yield name, balance(world.routing, replicas)
        except ValueError:
            continue


def gain_lines(found: Iterable[Gain], most: int = 3) -> Iterator[str]:
    """The best changes, and anomalies, for people."""
    found = list(found)
    worth = [gain for gain in found if gain.gain > WORTH][:most]
    if worth:
        yield "changes that would help most, each simulated alone"
        yield from map(_line, worth)
    else:
        yield f"none of the changes that were simulated helps by more than {WORTH:.0%}"
    anomalies = [gain for gain in found if gain.gain < 0 and gain.change.faster]
    if anomalies:
        yield "slower with a faster part, as list schedules can be: tasks come in another order"
        yield from map(_line, anomalies)


def _line(gain: Gain) -> str:
    return f"  {-gain.gain:+.1%} to {gain.latency_us:.1f} us  {gain.change.name}"
