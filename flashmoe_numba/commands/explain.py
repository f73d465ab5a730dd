"""Explain one simulation: its critical path, where that time goes, and the changes that would shorten it most.

The changes are one at a time, and each is simulated: a faster part of the machine, another value of a knob, a level
routing. Nothing of it is measured: every number is simulated. `flashmoe validate` says how far off they are.
"""

from __future__ import annotations

import argparse

import sim
from sim.reading.explain import explain, lines
from sim.studies.what_if import changes, gain_lines, gains

from .simulation_flags import add_simulation_arguments, ask, load_engine, simulate_asked, simulated_config
from .sizes import layer_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_simulation_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Simulate, explain, and try what would help."""
    from tqdm import tqdm

    asked = ask(args, [args.policy])
    config = simulated_config(asked, args.tokens)
    load_engine()
    simulation = simulate_asked(asked, args.policy, config, args.replicas, args.seed)
    print(_heading(layer_name(args), simulation))
    print("\n".join(lines(simulation.graph, explain(simulation.graph, simulation.timeline))), flush=True)
    candidates = tqdm(changes(simulation), desc="changes simulated", unit="change", leave=False, disable=None)
    print("\n".join(gain_lines(gains(simulation, candidates))))
    return 0


def _heading(preset: str, simulation: sim.Simulation) -> str:
    world = simulation.world
    tokens = f"{world.config.num_tokens:,} tokens on each of {world.num_ranks} ranks"
    layer = f"{preset}, {world.config.num_experts} experts, top-{world.config.num_topk}, {tokens}"
    about = f"routing {world.routing.name}, {world.precision.name}"
    return (
        f"{simulation.policy}, simulated on {world.hardware.name}: {layer}, {about}: {simulation.latency_us:,.1f} us\n"
    )
