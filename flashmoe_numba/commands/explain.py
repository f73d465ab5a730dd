"""Explain one simulation: its critical path, where that time goes, and the changes that would shorten it most.

The changes are one at a time, and each is simulated: a faster part of the machine, another value of a knob, a level
routing. With --against another policy runs in the same world, and instead of changes there is a table of what makes the
difference, cause by cause. Nothing of it is measured: every number is simulated. `flashmoe validate` says how far off
they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import sim
from sim.reading.differences import causes_ns, difference_lines
from sim.reading.explain import explain, lines
from sim.reading.report import left_out_error
from sim.studies.what_if import changes, gain_lines, gains
from sim.world.world import FORWARD

from .patience import shown_when_slow, ticking
from .simulation_flags import (
    add_simulation_arguments,
    ask,
    check_policy,
    load_engine,
    simulate_asked,
    simulated_config,
)  # fmt: skip
from .sizes import layer_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_simulation_arguments(parser)
    parser.add_argument("--against", metavar="NAME", help="another policy, for what makes the difference to --policy")


def main(args: argparse.Namespace) -> int:
    """Simulate, explain, and try what would help."""
    policies = [args.policy]
    if args.against is not None:
        check_policy("--against", args.against)
        policies.append(args.against)
    asked = ask(args, policies)
    config = simulated_config(asked, args.tokens)
    load_engine()
    simulations = []
    for policy in policies:
        with shown_when_slow(policy, args.progress):
            simulations.append(simulate_asked(asked, policy, config, args.replicas, args.seed))
    if len(simulations) == 1:
        print("\n".join(_path(layer_name(args), simulations[0])), flush=True)
        _print_gains(simulations[0])
    else:
        print("\n".join(_difference(layer_name(args), simulations)))
    return 0


def _print_gains(simulation: sim.Simulation) -> None:
    """The changes that help most, and how many are simulated meanwhile."""
    from tqdm import tqdm

    candidates = tqdm(changes(simulation), desc="changes simulated", unit="change", leave=False, disable=None)
    with candidates, ticking(candidates):
        found = gains(simulation, candidates)
    print("\n".join(gain_lines(found)))


def _path(preset: str, simulation: sim.Simulation) -> Iterator[str]:
    """A heading, and the critical path."""
    yield _heading(preset, simulation)
    yield from lines(simulation.graph, explain(simulation.graph, simulation.timeline))


def _difference(preset: str, simulations: list[sim.Simulation]) -> Iterator[str]:
    """What makes the difference, and both critical paths."""
    one, other = (causes_ns(each.graph, explain(each.graph, each.timeline)) for each in simulations)
    yield from difference_lines((simulations[0].policy, simulations[1].policy), one, other)
    for simulation in simulations:
        yield ""
        yield from _path(preset, simulation)


def _heading(preset: str, simulation: sim.Simulation) -> str:
    world = simulation.world
    tokens = f"{world.config.num_tokens:,} tokens on each of {world.num_ranks} ranks"
    layer = f"{preset}, {world.config.num_experts} experts, top-{world.config.num_topk}, {tokens}"
    passes = "" if world.passes == FORWARD else f", {world.passes}"
    about = f"routing {world.routing.name}, {world.precision.name}{passes}"
    what = f"{simulation.policy}, simulated on {world.hardware.name}: {layer}, {about}"
    return f"{what}: {simulation.latency_us:,.1f} us{_error(simulation)}\n{_computed(simulation)}\n"


def _computed(simulation: sim.Simulation) -> str:
    """What of the routing was computed, and how unevenly."""
    said = sim.report(simulation)
    capacity = "no capacity" if said.capacity is None else f"capacity {said.capacity:,} rows"
    lost = f", {said.dropped:,} dropped" if said.dropped else ""
    uneven = f"busiest rank {said.rank_imbalance:.2f} of the mean, busiest expert {said.expert_imbalance:.2f}"
    return f"{said.rows:,} rows{lost}, {capacity}; {uneven}"


def _error(simulation: sim.Simulation) -> str:
    """What measurements say of it, if its rate is not just set."""
    error = left_out_error(simulation)
    if error is not None:
        return f" (measurements that no fit saw: {100 * error:.1f} % off)"
    return " (no measurement)" if simulation.knobs.rate is None else ""
