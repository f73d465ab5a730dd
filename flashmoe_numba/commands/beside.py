"""What `flashmoe sim` says beside a layer's report: a step of the whole model, energy and money; flags and values."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sim
from reference import read_preset
from sim.studies.whole_model import model_step
from sim.world.model_shape import Shape, read_shape
from sim.world.world import FORWARD

from ..checkpoints.folder import read_json
from ..checkpoints.models import find_families
from ..errors import UsageError
from .columns import Rows
from .flags import blaming, integer, positive

CONTEXT = 4096
MOST = 1e9  # watts or dollars, so that sums of any run are numbers
ALL = "all"
Beside = dict[str, Any]  # what comes to a report's row of the JSON


def add_beside_arguments(parser: argparse.ArgumentParser) -> None:
    """`--layers`, `--context`, `--watts`, `--dollars-per-gpu-hour`."""
    group = parser.add_argument_group(
        "beside the layer",
        "T is the layer's latency, or with --layers the time per output token; R ranks, N tokens of each",
    )
    add = group.add_argument
    whole = "a step of the model's first N layers that decodes: attention, dense parts and head by roofline"
    add("--layers", type=_layers, metavar=f"N|{ALL}", help=f"{whole} (sim/studies/whole_model.py)")
    add("--context", type=integer(1), metavar="N", help=f"tokens that each sequence has already [{CONTEXT}]")
    amount = positive(MOST, f"a positive number of at most {MOST:g}")
    add("--watts", type=amount, metavar="W", help="of a GPU: energy = W R T; J for a million tokens = 1e6 W T / N")
    money = "dollars for a million tokens = 1e6 (D / 3600 s) T / N"
    add("--dollars-per-gpu-hour", type=amount, metavar="D", help=money)


def shape_from(args: argparse.Namespace) -> Shape | None:
    """The whole model's sizes, if it is asked for.

    Raises:
        UsageError: nobody says them, they are of a kind that is not modelled, or a backward is simulated.
    """
    if args.layers is None:
        if args.context is not None:
            raise UsageError("argument --context: goes with --layers")
        return None
    if args.passes != FORWARD:
        raise UsageError(f"argument --layers: a step that decodes needs --pass {FORWARD}, got {args.passes}")
    number = None if args.layers == ALL else args.layers
    with blaming("argument --layers"):
        if args.model_config:
            return read_shape(find_families(read_json(Path(args.model_config)), args.family)[1], number)
        model = read_preset(args.preset).get("model")
        if model is None:
            raise ValueError(f"the preset {args.preset} says no sizes of a whole model: give its --model-config")
        return read_shape(model, number)


def beside(args: argparse.Namespace, shape: Shape | None, simulation: sim.Simulation) -> Beside:
    """What is asked for beside the report of a simulation."""
    found: Beside = {}
    seconds = simulation.latency_us / 1e6
    if shape is not None:
        with blaming("argument --layers"):
            step = model_step(simulation, shape, args.context or CONTEXT)
        found["model"], seconds = asdict(step), step.tpot_ms / 1000
    config = simulation.world.config
    per_million = 1e6 * seconds / config.num_tokens
    if args.watts is not None:
        found["energy_joules"] = args.watts * config.num_ranks * seconds
        found["joules_per_million_tokens"] = args.watts * per_million
    if args.dollars_per_gpu_hour is not None:
        found["dollars_per_million_tokens"] = args.dollars_per_gpu_hour / 3600 * per_million
    return found


def notes(rows: Rows) -> Iterator[str]:
    """What further columns mean, below the tables."""
    if "model" in rows[0]:
        step = rows[0]["model"]
        yield (
            f"TPOT: roofline + simulation: {step['layers']} layers, {step['moe_layers']} of them with the simulated "
            f"layer; attention over {step['context']:,} tokens,"
        )
        yield "dense layers and head by roofline, a lower bound; what it leaves out: docs/simulator.md"


def _layers(text: str) -> int | str:
    return text if text == ALL else integer(1)(text)
