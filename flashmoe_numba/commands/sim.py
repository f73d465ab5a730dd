"""Simulate schedules of a layer, on hardware that need not be here: how long it takes, and what the time goes into.

Nothing of it is measured: every number is simulated. `flashmoe validate` says how far off they are.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import sim
from reference import MoEConfig
from sim.policies import passes_of
from sim.policies.outside import SUFFIX, TEMPLATE, is_file
from sim.reading.page.gather import gather
from sim.reading.page.write import join
from sim.reading.places import compared
from sim.studies.seeds import over_seeds
from sim.world.recorded import is_recorded

from ..errors import UsageError
from .beside import add_beside_arguments, beside, shape_from
from .catalogue import catalogue, details
from .columns import column_lines
from .flags import blaming
from .outputs import add_json_argument, check_outputs, give, make_folder
from .patience import shown_when_slow
from .simulated import tables
from .simulation_flags import (
    Asked,
    add_simulation_arguments,
    ask,
    load_engine,
    saving,
    simulate_asked,
    simulated_config,
)
from .sizes import layer_name

OUTPUTS = ("json", "trace", "plot", "html")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `flashmoe sim`."""
    add_simulation_arguments(parser, many=True)
    add_beside_arguments(parser)
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--overlap", action="store_true", help="also simulate 2 ranks, for the overlap efficiency T(2) / T")
    add_json_argument(group)
    add("--trace", metavar="FILE", help="write the one simulation for https://ui.perfetto.dev")
    add("--plot", metavar="FILE", help="draw the one simulation; as PNG, or .pdf, .svg")
    add("--html", metavar="FILE", help="write all simulations as one page for a browser, with timelines")
    add("--new-policy", metavar="FILE.py", help="write a schedule to begin with, for --policy FILE.py; no simulation")
    there = "say what there is, with all knobs, or where the values of a policy, a machine, ... are from; no simulation"
    add("--list", nargs="?", const=True, metavar="NAME", help=there)
    parser.epilog = "\n".join(["columns:", *column_lines()])


def main(args: argparse.Namespace) -> int:
    """Simulate what the flags describe."""
    from tqdm import tqdm

    if args.list is not None:
        _require_no_outputs(args, "--list")
        print("\n".join(catalogue() if args.list is True else details(args.list)))
        return 0
    if args.new_policy is not None:
        _require_no_outputs(args, "--new-policy")
        return _write_policy(Path(args.new_policy))
    policies = _able(args.passes) if args.policy == "all" else args.policy.split(",")
    asked = ask(args, policies)
    configs = [simulated_config(asked, tokens) for tokens in args.tokens or [None]]
    points = list(itertools.product(configs, policies))
    _check_overlap(args)
    _check_files(args, len(points))
    shape = shape_from(args)
    load_engine()
    rows, gathered = [], []
    for config, policy in tqdm(points, desc="simulations", unit="run", leave=False, disable=len(points) == 1 or None):
        with shown_when_slow(policy, args.progress):
            simulation, report = _simulate(asked, policy, config)
        rows.append(asdict(report) | _about(asked, config, report) | beside(args, shape, simulation))
        gathered += [gather(simulation, len(points))] if args.html else []
    rows = compared(rows, lambda row: row["tokens"])
    _write(asked, configs, rows)
    if args.html:
        join(rows, gathered, args.html)
    _write_pictures(args, simulation)
    return 0


def _able(passes: str) -> list[str]:
    """All policies that can be asked for these passes."""
    return [name for name in sim.policy_names() if passes in passes_of(name)]


def _write_policy(path: Path) -> int:
    """A policy of one's own to begin with, where nothing is yet."""
    if not is_file(str(path)):
        raise UsageError(f"argument --new-policy: must end with {SUFFIX}, got {str(path)!r}")
    make_folder("--new-policy", str(path), path.parent)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(TEMPLATE.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"argument --new-policy: cannot write {str(path)!r}: {error.strerror}") from None
    print(f"{path} is a schedule that runs as it is: flashmoe sim --policy {path}")
    return 0


def _check_files(args: argparse.Namespace, num_points: int) -> None:
    for flag in ("trace", "plot"):
        if getattr(args, flag) and num_points > 1:
            raise UsageError(f"argument --{flag}: needs one policy and one --tokens, got {num_points} combinations")
    check_outputs({f"--{flag}": getattr(args, flag) for flag in OUTPUTS})


def _require_no_outputs(args: argparse.Namespace, instead: str) -> None:
    for flag in OUTPUTS:
        if getattr(args, flag) is not None:
            raise UsageError(f"argument --{flag}: is of simulations, of which {instead} makes none")


def _check_overlap(args: argparse.Namespace) -> None:
    if args.overlap and is_recorded(args.routing):
        rule = "needs a routing that is drawn, because 2 ranks have fewer experts"
        raise UsageError(f"argument --overlap: {rule}; got --routing {args.routing}")


# ---- simulations


def _simulate(asked: Asked, policy: str, config: MoEConfig) -> tuple[sim.Simulation, sim.Report]:
    """The one simulation, or that of the median seed; its report, with the overlap efficiency if it is asked for."""
    args = asked.args

    def run(seed: int) -> sim.Simulation:
        return simulate_asked(asked, policy, config, args.replicas, seed)

    simulation, report = over_seeds(run, args.seed, args.seeds)
    if not args.overlap:
        return simulation, report
    with blaming("argument --overlap: of 2 ranks"):
        pair = _of_two_ranks(config)
    replicas = None if args.replicas is None else 2 * args.replicas // config.num_ranks  # as many copies on a rank
    two = simulate_asked(asked, policy, pair, replicas, _seed(args, report))
    return simulation, replace(report, overlap_efficiency=two.latency_us / simulation.latency_us)


def _of_two_ranks(config: MoEConfig) -> MoEConfig:
    """As many tokens and experts on each; an expert gets more rows of each rank, and has room for as many more."""
    num_experts, capacity = 2 * config.num_experts_per_rank, config.capacity
    if capacity is not None:
        capacity = min(config.num_tokens, -(-capacity * config.num_experts // num_experts))
    return replace(config, num_ranks=2, num_experts=num_experts, capacity=capacity)


def _seed(args: argparse.Namespace, report: sim.Report) -> int:
    """Of the simulation that is reported."""
    return int(report.spread["median_seed"]) if report.spread else int(args.seed)


# ---- outputs


def _about(asked: Asked, config: MoEConfig, report: sim.Report) -> dict[str, Any]:
    """What a row of the JSON says beside its report."""
    args = asked.args
    layer = {name: value for name, value in asdict(config).items() if name not in ("num_tokens", "capacity")}
    return {"preset": layer_name(args), "terms": args.terms, "seed": _seed(args, report), "layer": layer}


def _write(asked: Asked, configs: Sequence[MoEConfig], rows: list[dict[str, Any]]) -> None:
    args = asked.args
    seeds = f"seed {args.seed}" if args.seeds == 1 else f"seeds {args.seed} to {args.seed + args.seeds - 1}"
    kept = [f"save={args.save} of {', '.join(saving(asked.knobs))}"] if args.save else []
    about = {"preset": layer_name(args), "terms": args.terms, "seeds": seeds, "set": [*args.set, *kept]}
    give(args.json, [*tables(about, configs[0], rows), *_chosen(asked, rows)], rows)


def _chosen(asked: Asked, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Knobs that a policy chose by the layer, because they were not set."""
    for row in rows:
        given = asdict(asked.knobs[row["policy"]])
        chosen = [f"{name}={value}" for name, value in row["knobs"].items() if given[name] != value]
        if chosen:
            yield f"{row['policy']} at {row['tokens']:,} tokens: {', '.join(chosen)}"


def _write_pictures(args: argparse.Namespace, simulation: sim.Simulation) -> None:
    if args.trace:
        sim.write_chrome_trace(simulation, Path(args.trace))
    if args.plot:
        sim.plot_timeline(simulation, Path(args.plot), layer_name(args))
