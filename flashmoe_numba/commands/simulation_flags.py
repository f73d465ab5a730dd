"""The flags that say what to simulate: policies, machine, layer, routing, knobs. Shared by all that simulate."""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import sim
from reference import MoEConfig
from reference.layout import SAVES
from sim.policies import TERMS, row_tile
from sim.world.recorded import has_layers, is_recorded
from sim.world.rounding import WAYS
from sim.world.world import FORWARD, PASSES

from ..errors import UsageError
from .flags import blaming, integer
from .knobs import knob_types, knobs_from
from .sizes import add_size_arguments, config_from

DEFAULT_PRESET = "llama-4-scout"
DEFAULT_HARDWARE = "8xH100"
PATIENCE_S = 3.0
SAVE = "save"  # a knob
FLAGS = {"rounding": "argument --round-tokens", "layer": "the layer"}  # of the other parts of a scenario: their names
TRAINED = "what is simulated; training: forward, backward, and the sum over ranks of dense gradients"
RECORDED = """\
A file has choices, [tokens, topk], or by rank [ranks, tokens, topk], where -1 and the number of experts are none; or a
histogram of tokens or of shares, [experts], or by rank [ranks, experts]. One index more in front is of layers: --layer
says which. Without --layer a leading index is of ranks. FILE.npz:KEY names one of several arrays; topk_idx, the only
one, or the only one of integers needs no name. A .csv has a line per token, rank or expert, or a header,
[layer,][rank,]expert,tokens, and a line for each number."""


def add_simulation_arguments(parser: argparse.ArgumentParser, many: bool = False) -> None:
    """All of them; with `many`, `--policy` and `--tokens` are lists."""
    add = parser.add_argument
    names = f"{', '.join(sim.policy_names())}{' or all' if many else ''}, or a .py file of your own [flashmoe]"
    add("--policy", default="flashmoe", metavar="NAME[,NAME]" if many else "NAME", help=names)
    add("--set", action="append", default=[], metavar="KNOB=VALUE", help="of all chosen policies; may be repeated")
    terms = "system: each policy's own tiles and fitted rate; schedule: the same tiles and rate for all [system]"
    add("--terms", choices=TERMS, default=TERMS[0], help=terms)
    kinds = ", ".join(sim.hardware_names())
    machine = f"a machine of {kinds} like 8xH100 or 2x8xH100, or a .toml file, or 2xFILE.toml; its GPUs are the ranks"
    add("--hardware", default=DEFAULT_HARDWARE, metavar="NAME|FILE", help=f"{machine} [{DEFAULT_HARDWARE}]")
    add("--pass", dest="passes", choices=PASSES, default=FORWARD, help=f"{TRAINED} [{FORWARD}]")
    kept = "what forwards keep for backwards, of schedules with that knob: rows and their up products, rows, no rows"
    add("--save", choices=SAVES, help=f"{kept} [{SAVES[0]}]")
    add("--precision", metavar="NAME", help=f"{', '.join(sim.PRECISIONS)} [the layer's dtype]")
    add("--progress", action="store_true", help="show that of a long simulation though stderr is no terminal")
    add_size_arguments(parser, DEFAULT_PRESET, many_tokens=many, layer_of="the model, or of a routing from a file")
    _add_routing_arguments(parser, many)


def _add_routing_arguments(parser: argparse.ArgumentParser, many: bool) -> None:
    add = parser.add_argument_group("routing", RECORDED).add_argument
    add("--routing", default="uniform", metavar="NAME|FILE", help=f"{', '.join(sim.ROUTING_NAMES)} [uniform]")
    add("--seed", type=integer(0), default=0, metavar="N", help="of what is drawn [0]")
    if many:
        add("--seeds", type=integer(1), default=1, metavar="N", help="N seeds from --seed on: median, min and max [1]")
    copies = "place experts by load, with N copies of busy ones beside them"
    add("--replicas", type=integer(0), metavar="N", help=copies)
    add("--round-tokens", choices=WAYS, help="round each expert's rows to a multiple of the policy's tile_m")


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
    knobs = knobs_from(policies, args.set, args.terms)
    return Asked(args=args, hardware=hardware, knobs=_with_save(args, knobs))


def _with_save(args: argparse.Namespace, knobs: dict[str, sim.PolicyKnobs]) -> dict[str, sim.PolicyKnobs]:
    """`--save` as the knob of those that have it, which only a backward asks for."""
    given = [f"--set {pair}" for pair in args.set if pair.startswith(f"{SAVE}=")]
    given += [f"--save {args.save}"] if args.save else []
    if given and args.passes == FORWARD:
        raise UsageError(f"argument --save: goes with --pass backward or training, got {given[-1]} without")
    if args.save is None:
        return knobs
    if len(given) > 1:
        raise UsageError(f"argument --save: is the same as {given[0]}, got both")
    able = saving(knobs)
    if not able:
        raise UsageError(f"argument --save: no knob {SAVE!r} in {', '.join(knobs)}; what their forward keeps is fixed")
    return knobs | {name: replace(knobs[name], **{SAVE: args.save}) for name in able}


def saving(policies: Iterable[str]) -> list[str]:
    """Those of the policies that have a choice of what a forward keeps."""
    return [name for name in policies if SAVE in knob_types(name)]


def simulated_config(asked: Asked, tokens: int | None) -> MoEConfig:
    """The layer; by default all GPUs are ranks. `--layer` is the model's, or that of a recording, or of both."""
    args = asked.args
    if args.model_config is None and is_recorded(args.routing):
        args = argparse.Namespace(**vars(args) | {"layer": None})
    return config_from(args, num_ranks=args.ranks or asked.hardware.num_gpus, num_tokens=tokens)


def check_policy(flag: str, name: str) -> None:
    """Raise a UsageError if there is no such policy, or its file is none."""
    try:
        sim.make_knobs(name, {})
    except (OSError, ValueError) as error:
        raise UsageError(f"argument {flag}: {error}") from None


def simulate_asked(asked: Asked, policy: str, config: MoEConfig, replicas: int | None, seed: int) -> sim.Simulation:
    """One policy on one layer."""
    args = asked.args
    scenario = sim.Scenario(
        config=config,
        hardware=asked.hardware,
        precision=config.dtype if args.precision is None else args.precision,
        routing=args.routing,
        seed=seed,
        layer=_recorded_layer(args, config),
        round_to=_row_tile(asked, policy) if args.round_tokens else None,
        round_how=args.round_tokens or "nearest",
        replicas=replicas,
        passes=args.passes,
    )
    world = scenario.make(lambda part: blaming(FLAGS.get(part, f"argument --{part}")))
    try:
        with blaming(f"policy {policy}"):
            return sim.simulate(policy, world, asked.knobs[policy])
    except sim.DeadlockError as error:
        raise UsageError(f"policy {policy}: {error}") from None


def _recorded_layer(args: argparse.Namespace, config: MoEConfig) -> int | None:
    """`--layer` of a recording; with `--model-config` the recording may be of that one layer."""
    if not is_recorded(args.routing) or args.model_config is None:
        return args.layer if is_recorded(args.routing) else None
    with blaming("argument --routing"):
        return args.layer if has_layers(args.routing, config) else None


def _row_tile(asked: Asked, policy: str) -> int:
    with blaming("argument --round-tokens"):
        return row_tile(policy, asked.knobs[policy])


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
