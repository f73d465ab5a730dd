"""One simulation: a policy in a world, its graph and its timeline."""

from __future__ import annotations

from dataclasses import dataclass

from .drafting.knobs import PolicyKnobs
from .engine.graph import TaskGraph
from .engine.timeline import Timeline
from .policies import build, knobs_in_world
from .world.scenario import Scenario
from .world.world import World


@dataclass(frozen=True, kw_only=True, eq=False)
class Simulation:
    """What was simulated, and what came out. Everything else (metrics, traces, plots, explanations) reads this."""

    policy: str
    knobs: PolicyKnobs
    world: World
    graph: TaskGraph
    timeline: Timeline

    @property
    def latency_us(self) -> float:
        return self.timeline.makespan_ns / 1000


def simulate(policy: str, world: World, knobs: PolicyKnobs | None = None, *, keep_runs: bool = True) -> Simulation:
    """Run a policy in a world, by the compiled engine.

    Args:
        keep_runs: False where only nodes and links will be looked at, for very large worlds.

    Raises:
        TypeError: `world` is none; ValueError: no such policy; DeadlockError: its graph can never end, which is a fault
            of the policy.
    """
    from .engine.compiled import run

    if not isinstance(world, World):
        hint = "; scenario.make() makes one" if isinstance(world, Scenario) else ""
        raise TypeError(f"world must be a World, got {type(world).__name__}{hint}")

    knobs = knobs_in_world(policy, world, knobs)
    graph = build(policy, world, knobs)
    return Simulation(policy=policy, knobs=knobs, world=world, graph=graph, timeline=run(graph, keep_runs=keep_runs))
