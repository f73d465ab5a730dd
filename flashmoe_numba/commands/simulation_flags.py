"""The flags that say what to simulate: policies, machine, layer, routing, knobs. Shared by all that simulate."""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import sim
from reference import MoEConfig
from sim.world.rounding import WAYS

from ..errors import UsageError
from .knobs import knobs_from
from .sizes import add_size_arguments, blaming, integer

DEFAULT_PRESET = "llama-4-scout"
DEFAULT_HARDWARE = "8xH100"
PATIENCE_S = 3.0
FLAGS = {"rounding": "argument --round-tokens", "layer": "the layer"}  # of the other parts of a scenario: their names


def add_simulation_arguments(parser: argparse.ArgumentParser, many: bool = False) -> None:
    """All of them; with `many`, `--policy` and `--tokens` are lists."""
    add = parser.add_argument
    names = f"{', '.join(sim.policy_names())}{' or all' if many else ''}, or a .py file of your own [flashmoe]"
    add("--policy", default="flashmoe", metavar="NAME[,NAME]" if many else "NAME", help=names)
    kinds = ", ".join(sim.hardware_names())
    machine = f"a machine of {kinds} like 8xH100 or 2x8xH100, or a .toml file, or 2xFILE.toml; its GPUs are the ranks"
    add("--hardware", default=DEFAULT_HARDWARE, metavar="NAME|FILE", help=f"{machine} [{DEFAULT_HARDWARE}]")
    add_size_arguments(parser, DEFAULT_PRESET, many_tokens=many)
    add("--precision", metavar="NAME", help=f"{', '.join(sim.PRECISIONS)} [the layer's dtype]")
    add("--routing", default="uniform", metavar="NAME", help=f"{', '.join(sim.ROUTING_NAMES)} [uniform]")
    add("--seed", type=integer(0), default=0, metavar="N", help="of the routing [0]")
    copies = "place experts by load, with N copies of busy ones beside them"
    add("--replicas", type=integer(0), metavar="N", help=copies)
    add("--round-tokens", choices=WAYS, help="round each expert's rows to a multiple of the policy's tile_m")
    add("--progress", action="store_true", help="show that of a long simulation though stderr is no terminal")
    add("--set", action="append", default=[], metavar="KNOB=VALUE", help="of all chosen policies; may be repeated")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the flags ask for, checked as far as it does not depend on sizes."""

    args: argparse.Namespace
    hardware: sim.Hardware
    knobs: dict[str, sim.PolicyKnobs]


def ask(args: argparse.Namespace, policies: Sequence[str]) -> Asked:
    """What the flags ask for.

    Raises:
        UsageError: naming the flag, its value and the rule.
    """
    for name in policies:
        check_policy("--policy", name)
    with blaming("argument --hardware"):
        hardware = sim.load_hardware(args.hardware)
    return Asked(args=args, hardware=hardware, knobs=knobs_from(policies, args.set))


def check_policy(flag: str, name: str) -> None:
    """Raise a UsageError if there is no such policy, or its file is none."""
    try:
        sim.make_knobs(name, {})
    except (OSError, ValueError) as error:
        raise UsageError(f"argument {flag}: {error}") from None


def simulate_asked(asked: Asked, policy: str, config: MoEConfig, replicas: int | None) -> sim.Simulation:
    """One policy on one layer."""
    args = asked.args
    scenario = sim.Scenario(
        config=config,
        hardware=asked.hardware,
        precision=args.precision or config.dtype,
        routing=args.routing,
        seed=args.seed,
        round_to=_tile_m(asked, policy) if args.round_tokens else None,
        round_how=args.round_tokens or "nearest",
        replicas=replicas,
    )
    world = scenario.make(lambda part: blaming(FLAGS.get(part, f"argument --{part}")))
    try:
        with blaming(f"policy {policy}"):
            return sim.simulate(policy, world, asked.knobs[policy])
    except sim.DeadlockError as error:
        raise UsageError(f"policy {policy}: {error}") from None


def _tile_m(asked: Asked, policy: str) -> int:
    tile_m = getattr(asked.knobs[policy], "tile_m", None)
    if tile_m is None:
        raise UsageError(f"argument --round-tokens: policy {policy} chooses its row tile: give it with --set tile_m=N")
    return int(tile_m)


def load_engine() -> None:
    """Have the engine compiled, and say so where that is not just a matter of reading the cache."""
    message = "flashmoe: compiling the event loop, which is kept for the next time"
    timer = threading.Timer(PATIENCE_S, print, [message], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    if sys.stderr.isatty():
        timer.start()
    from sim.engine import compiled
    from sim.engine.graph import GraphBuilder

    compiled.run(GraphBuilder().build())
    timer.cancel()
