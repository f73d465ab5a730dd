"""Simulate schedules of a layer, on hardware that need not be here: how long it takes, and what the time goes into.

Nothing of it is measured: every number is simulated. `flashmoe validate` says how far off they are.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import sim
from reference import MoEConfig
from sim.reading.page.gather import gather
from sim.reading.page.write import join

from ..errors import UsageError
from .simulated import catalogue, table
from .simulation_flags import Asked, add_simulation_arguments, ask, load_engine, simulate_asked
from .sizes import add_json_argument, blaming, check_outputs, config_from, give, layer_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `flashmoe sim`."""
    add_simulation_arguments(parser, many=True)
    add = parser.add_argument
    add("--overlap", action="store_true", help="also simulate 2 ranks, for the overlap efficiency T(2) / T")
    add_json_argument(parser)
    add("--trace", metavar="FILE", help="write the one simulation for https://ui.perfetto.dev")
    add("--plot", metavar="FILE", help="draw the one simulation; as PNG, or .pdf, .svg")
    add("--html", metavar="FILE", help="write all simulations as one page for a browser, with timelines")
    add("--list", action="store_true", help="say what there is, with all knobs, and simulate nothing")


def main(args: argparse.Namespace) -> int:
    """Simulate what the flags describe."""
    from tqdm import tqdm

    if args.list:
        print("\n".join(catalogue()))
        return 0
    policies = list(sim.POLICY_NAMES) if args.policy == "all" else args.policy.split(",")
    asked = ask(args, policies)
    num_ranks = args.ranks or asked.hardware.num_gpus
    configs = [config_from(args, num_ranks=num_ranks, num_tokens=tokens) for tokens in args.tokens or [None]]
    points = list(itertools.product(configs, policies))
    _check_files(args, len(points))
    load_engine()
    reports, gathered = [], []
    for config, policy in tqdm(points, desc="simulations", unit="run", leave=False, disable=len(points) == 1 or None):
        simulation = simulate_asked(asked, policy, config, args.replicas)
        reports.append(_report(asked, simulation))
        gathered += [gather(simulation, len(points))] if args.html else []
    rows = _write(args, configs, reports)
    if args.html:
        join(rows, gathered, args.html)
    _write_pictures(args, simulation)
    return 0


def _check_files(args: argparse.Namespace, num_points: int) -> None:
    for flag in ("trace", "plot"):
        if getattr(args, flag) and num_points > 1:
            raise UsageError(f"argument --{flag}: needs one policy and one --tokens, got {num_points} combinations")
    check_outputs({f"--{flag}": getattr(args, flag) for flag in ("json", "trace", "plot", "html")})


# ---- simulations


def _report(asked: Asked, simulation: sim.Simulation) -> sim.Report:
    """The report, with the overlap efficiency if it is asked for."""
    report = sim.report(simulation)
    if not asked.args.overlap:
        return report
    config, replicas = simulation.world.config, asked.args.replicas
    with blaming("argument --overlap: of 2 ranks"):
        pair = replace(config, num_ranks=2, num_experts=2 * config.num_experts_per_rank)
    replicas = None if replicas is None else 2 * replicas // config.num_ranks  # as many copies on a rank
    two = simulate_asked(asked, simulation.policy, pair, replicas)
    return replace(report, overlap_efficiency=two.latency_us / simulation.latency_us)


# ---- outputs


def _write(
    args: argparse.Namespace, configs: Sequence[MoEConfig], reports: Sequence[sim.Report]
) -> list[dict[str, Any]]:
    """The table, and the rows as JSON has them."""
    about = {"preset": layer_name(args), "seed": args.seed, "layer": asdict(configs[0])}
    del about["layer"]["num_tokens"]  # each report has its own
    lines = table(layer_name(args), configs[0], args.seed, reports)
    rows = [asdict(report) | about for report in reports]
    give(args.json, lines, rows)
    return rows


def _write_pictures(args: argparse.Namespace, simulation: sim.Simulation) -> None:
    if args.trace:
        sim.write_chrome_trace(simulation, Path(args.trace))
    if args.plot:
        sim.plot_timeline(simulation, Path(args.plot), layer_name(args))
