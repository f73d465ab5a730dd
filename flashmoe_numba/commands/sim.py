"""Simulate schedules of a layer, on hardware that need not be here: how long it takes, and what the time goes into.

Nothing of it is measured: every number is simulated. `flashmoe validate` says how far off they are.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import sim
from reference import MoEConfig
from sim.rounding import WAYS

from . import UsageError
from .knobs import knobs_from
from .simulated import catalogue, table
from .sizes import (
    add_json_argument,
    add_size_arguments,
    check_outputs,
    config_from,
    in_flags,
    integer,
    output_file,
    write_json,
)

DEFAULT_PRESET = "llama-4-scout"
DEFAULT_HARDWARE = "8xH100"
PATIENCE_S = 3.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `flashmoe sim`."""
    add = parser.add_argument
    add("--policy", default="flashmoe", metavar="NAME[,NAME]", help=f"{', '.join(sim.POLICY_NAMES)} or all [flashmoe]")
    kinds = ", ".join(sim.hardware_names())
    machine = f"a machine of {kinds} like 8xH100 or 2x8xH100, or a .toml file; by default all its GPUs are ranks"
    add("--hardware", default=DEFAULT_HARDWARE, metavar="NAME|FILE", help=f"{machine} [{DEFAULT_HARDWARE}]")
    add_size_arguments(parser, DEFAULT_PRESET, many_tokens=True)
    add("--precision", metavar="NAME", help=f"{', '.join(sim.PRECISIONS)} [the layer's dtype]")
    add("--routing", default="uniform", metavar="NAME", help=f"{', '.join(sim.ROUTING_NAMES)} [uniform]")
    add("--seed", type=integer(0), default=0, metavar="N", help="of the routing [0]")
    add(
        "--replicas", type=integer(0), metavar="N", help="place experts by load, with N copies of busy ones beside them"
    )
    add("--round-tokens", choices=WAYS, help="round each expert's rows to a multiple of the policy's tile_m")
    add("--set", action="append", default=[], metavar="KNOB=VALUE", help="of all chosen policies; may be repeated")
    add("--overlap", action="store_true", help="also simulate 2 ranks, for the overlap efficiency T(2) / T")
    add_json_argument(parser)
    add("--trace", metavar="FILE", help="write the one simulation for https://ui.perfetto.dev")
    add("--plot", metavar="FILE", help="draw the one simulation as PNG")
    add("--list", action="store_true", help="say what there is, with all knobs, and simulate nothing")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the flags ask for, checked as far as it does not depend on sizes."""

    args: argparse.Namespace
    hardware: sim.Hardware
    knobs: dict[str, sim.PolicyKnobs]


def main(args: argparse.Namespace) -> int:
    """Simulate what the flags describe."""
    if args.list:
        print("\n".join(catalogue()))
        return 0
    policies = _policies(args.policy)
    asked = Asked(args=args, hardware=_hardware(args.hardware), knobs=knobs_from(policies, args.set))
    configs = [_config(args, tokens, args.ranks or asked.hardware.num_gpus) for tokens in args.tokens or [None]]
    points = list(itertools.product(configs, policies))
    _check_files(args, len(points))
    _load_engine()
    reports = []
    for config, policy in _progress(points):
        simulation = _simulate(asked, policy, config, args.replicas)
        reports.append(_report(asked, simulation))
    _write(args, configs, reports)
    _write_pictures(args, simulation)
    return 0


def _policies(text: str) -> list[str]:
    names = list(sim.POLICY_NAMES) if text == "all" else text.split(",")
    for name in names:
        if name not in sim.POLICY_NAMES:
            raise UsageError(f"argument --policy: must be of {', '.join(sim.POLICY_NAMES)}, or all; got {name!r}")
    return names


def _hardware(name: str) -> sim.Hardware:
    with _blaming("argument --hardware"):
        return sim.load_hardware(name)


def _config(args: argparse.Namespace, tokens: int | None, num_ranks: int) -> MoEConfig:
    return config_from(argparse.Namespace(**{**vars(args), "tokens": tokens}), num_ranks)


def _check_files(args: argparse.Namespace, num_points: int) -> None:
    for flag in ("trace", "plot"):
        if getattr(args, flag) and num_points > 1:
            raise UsageError(f"argument --{flag}: needs one policy and one --tokens, got {num_points} combinations")
    check_outputs({f"--{flag}": getattr(args, flag) for flag in ("json", "trace", "plot")})
    if args.plot and not importlib.util.find_spec("matplotlib"):
        raise UsageError("argument --plot: needs matplotlib, not found here: pip install 'flashmoe-numba[plots]'")


@contextmanager
def _blaming(flag: str) -> Iterator[None]:
    """Turn what is wrong with a value into an error of its flag."""
    try:
        yield
    except (TypeError, ValueError, OSError) as error:
        raise UsageError(f"{flag}: {in_flags(str(error))}") from None


# ---- simulations


def _simulate(asked: Asked, policy: str, config: MoEConfig, replicas: int | None) -> sim.Simulation:
    world = _world(asked, policy, config, replicas)
    with _blaming(f"policy {policy}"):
        return sim.simulate(policy, world, asked.knobs[policy])


def _world(asked: Asked, policy: str, config: MoEConfig, replicas: int | None) -> sim.World:
    args = asked.args
    with _blaming("argument --precision"):
        precision = sim.precision(args.precision or config.dtype)
    _check_sent_rows(config, asked.hardware, precision)
    with _blaming("argument --routing"):
        routing = sim.make_routing(args.routing, config, args.seed)
    if args.round_tokens:
        routing = sim.round_tokens(routing, _tile_m(asked, policy), args.round_tokens, args.seed)
    if replicas is not None:
        with _blaming("argument --replicas"):
            routing = sim.balance(routing, replicas)
    with _blaming("the layer"):
        return sim.World(config=config, hardware=asked.hardware, routing=routing, precision=precision)


def _check_sent_rows(config: MoEConfig, hardware: sim.Hardware, precision: sim.Precision) -> None:
    """Before a routing is made of more tokens than a GPU, or this machine, can hold."""
    row = config.hidden * (precision.token_bytes + precision.result_bytes)
    needed = config.num_tokens * config.num_topk * row / 1e9
    if needed > hardware.hbm_gb:
        there = f"and {hardware.name} has {hardware.hbm_gb:g} GB: take fewer"
        raise UsageError(f"argument --tokens: the rows that a rank sends need {needed:,.1f} GB, {there}")


def _tile_m(asked: Asked, policy: str) -> int:
    tile_m = getattr(asked.knobs[policy], "tile_m", None)
    if tile_m is None:
        raise UsageError(f"argument --round-tokens: policy {policy} chooses its row tile: give it with --set tile_m=N")
    return int(tile_m)


def _report(asked: Asked, simulation: sim.Simulation) -> sim.Report:
    """The report, with the overlap efficiency if it is asked for."""
    report = sim.report(simulation)
    if not asked.args.overlap:
        return report
    config, replicas = simulation.world.config, asked.args.replicas
    with _blaming("argument --overlap: of 2 ranks"):
        pair = replace(config, num_ranks=2, num_experts=2 * config.num_experts_per_rank)
    replicas = None if replicas is None else 2 * replicas // config.num_ranks  # as many copies on a rank
    two = _simulate(asked, simulation.policy, pair, replicas)
    return replace(report, overlap_efficiency=two.latency_us / simulation.latency_us)


def _load_engine() -> None:
    """Have the engine compiled, and say so where that is not just a matter of reading the cache."""
    message = "flashmoe sim: compiling the event loop, which is kept for the next time"
    timer = threading.Timer(PATIENCE_S, print, [message], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    if sys.stderr.isatty():
        timer.start()
    from sim import fast
    from sim.graph import GraphBuilder

    fast.run(GraphBuilder().build())
    timer.cancel()


def _progress(points: Sequence[tuple[MoEConfig, str]]) -> Iterable[tuple[MoEConfig, str]]:
    if len(points) == 1 or not sys.stderr.isatty():
        return points
    from tqdm import tqdm

    return tqdm(points, desc="simulations", unit="run", leave=False)


# ---- outputs


def _write(args: argparse.Namespace, configs: Sequence[MoEConfig], reports: Sequence[sim.Report]) -> None:
    if args.json != "-":
        print("\n".join(table(args.preset, configs[0], args.seed, reports)), flush=True)
    if args.json:
        about = {"preset": args.preset, "seed": args.seed, "layer": asdict(configs[0])}
        del about["layer"]["num_tokens"]  # each report has its own
        write_json(args.json, [asdict(report) | about for report in reports])


def _write_pictures(args: argparse.Namespace, simulation: sim.Simulation) -> None:
    if args.trace:
        sim.write_chrome_trace(simulation, output_file(args.trace))
    if args.plot:
        sim.plot_timeline(simulation, output_file(args.plot))
