"""The flags that say what to simulate: policies, machine, layer, routing, knobs. Shared by all that simulate."""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import sim
from reference import MoEConfig
from sim.world.rounding import WAYS
from sim.world.world import check_sent_rows

from . import UsageError
from .knobs import knobs_from
from .sizes import add_size_arguments, in_flags, integer

DEFAULT_PRESET = "llama-4-scout"
DEFAULT_HARDWARE = "8xH100"
PATIENCE_S = 3.0


def add_simulation_arguments(parser: argparse.ArgumentParser, many: bool = False) -> None:
    """All of them; with `many`, `--policy` and `--tokens` are lists."""
    add = parser.add_argument
    names = ", ".join(sim.POLICY_NAMES)
    if many:
        add("--policy", default="flashmoe", metavar="NAME[,NAME]", help=f"{names} or all [flashmoe]")
    else:
        add("--policy", default="flashmoe", choices=sim.POLICY_NAMES, metavar="NAME", help=f"{names} [flashmoe]")
    kinds = ", ".join(sim.hardware_names())
    machine = f"a machine of {kinds} like 8xH100 or 2x8xH100, or a .toml file; by default all its GPUs are ranks"
    add("--hardware", default=DEFAULT_HARDWARE, metavar="NAME|FILE", help=f"{machine} [{DEFAULT_HARDWARE}]")
    add_size_arguments(parser, DEFAULT_PRESET, many_tokens=many)
    add("--precision", metavar="NAME", help=f"{', '.join(sim.PRECISIONS)} [the layer's dtype]")
    add("--routing", default="uniform", metavar="NAME", help=f"{', '.join(sim.ROUTING_NAMES)} [uniform]")
    add("--seed", type=integer(0), default=0, metavar="N", help="of the routing [0]")
    copies = "place experts by load, with N copies of busy ones beside them"
    add("--replicas", type=integer(0), metavar="N", help=copies)
    add("--round-tokens", choices=WAYS, help="round each expert's rows to a multiple of the policy's tile_m")
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
        if name not in sim.POLICY_NAMES:
            raise UsageError(f"argument --policy: must be of {', '.join(sim.POLICY_NAMES)}, or all; got {name!r}")
    with blaming("argument --hardware"):
        hardware = sim.load_hardware(args.hardware)
    return Asked(args=args, hardware=hardware, knobs=knobs_from(policies, args.set))


def simulate_asked(asked: Asked, policy: str, config: MoEConfig, replicas: int | None) -> sim.Simulation:
    """One policy on one layer."""
    world = _world(asked, policy, config, replicas)
    with blaming(f"policy {policy}"):
        return sim.simulate(policy, world, asked.knobs[policy])


def _world(asked: Asked, policy: str, config: MoEConfig, replicas: int | None) -> sim.World:
    args = asked.args
    with blaming("argument --precision"):
        precision = sim.precision(args.precision or config.dtype)
    with blaming("argument --tokens"):
        check_sent_rows(config, asked.hardware, precision)
    with blaming("argument --routing"):
        routing = sim.make_routing(args.routing, config, args.seed)
    if args.round_tokens:
        routing = sim.round_tokens(routing, _tile_m(asked, policy), args.round_tokens, args.seed)
    if replicas is not None:
        with blaming("argument --replicas"):
            routing = sim.balance(routing, replicas)
    with blaming("the layer"):
        return sim.World(config=config, hardware=asked.hardware, routing=routing, precision=precision)


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


@contextmanager
def blaming(flag: str) -> Iterator[None]:
    """Turn what is wrong with a value into an error of its flag."""
    try:
        yield
    except (TypeError, ValueError, OSError) as error:
        raise UsageError(f"{flag}: {in_flags(str(error))}") from None
