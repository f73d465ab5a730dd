"""The flags that make a `MoEConfig`: a preset, and what is changed of it. Shared by all commands that take a layer."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from reference import ACTIVATIONS, DTYPES, MoEConfig, load_preset, make_plan, preset_names
from reference.config import expert_capacity
from reference.families import read_family
from reference.sizes import weight_bytes

from ..checkpoints import read_config
from ..errors import UsageError
from .flags import FLAGS, blaming, in_flags, integer, integers

DEFAULT_PRESET = "laptop-text"
NO_LIMIT = "none"  # of a capacity
MODEL_TOKENS = 128  # of each rank; a model's config does not say


def _capacity(text: str) -> int | str:
    return text if text == NO_LIMIT else integer(1)(text)


def add_size_arguments(
    parser: argparse.ArgumentParser,
    preset: str = DEFAULT_PRESET,
    many_tokens: bool = False,
    layer_of: str = "the model",
) -> Callable[..., argparse.Action]:
    """`--preset`, by default this one, or a published model's config; and one flag per size.

    With `many_tokens`, `--tokens` is a list; `layer_of` says of what `--layer` is one. Returns what adds flags that
    exclude `--preset`.
    """
    group = parser.add_argument_group("sizes", "the preset's or the model's where not given")
    add_source = add = group.add_mutually_exclusive_group().add_argument
    add("--preset", "--model", default=preset, metavar="NAME", help=f"{', '.join(preset_names())} [{preset}]")
    published = f"the config.json of a model: its layers' shapes [{MODEL_TOKENS} tokens, 1 rank]"
    add("--model-config", metavar="FILE", help=published)
    add = group.add_argument
    add("--layer", type=integer(0), metavar="N", help=f"of {layer_of} [0]")
    add(
        "--family", metavar="NAME", help="of the model's blocks, or a TOML file that describes them [by its model_type]"
    )
    add("--ranks", type=integer(1), metavar="N", help="ranks of expert parallelism; must divide the experts")
    if many_tokens:
        add("--tokens", type=integers(1), metavar="N[,N]", help="tokens of each rank; several are simulated in turn")
    else:
        add("--tokens", type=integer(1), metavar="N", help="tokens of each rank")
    add("--hidden", type=integer(1), metavar="N", help="row length of a token")
    add("--ffn", type=integer(1), metavar="N", help="row length inside an expert")
    add("--experts", type=integer(1), metavar="N", help="experts over all ranks")
    add("--topk", type=integer(1), metavar="N", help="experts of each token")
    add("--gated", action=argparse.BooleanOptionalAction, default=None, help="act(gate) * up instead of act(up)")
    add("--activation", metavar="NAME", help=", ".join(ACTIVATIONS))
    add("--dtype", metavar="NAME", help=f"{', '.join(DTYPES)}; sums are float32, for float64 float64")
    limit = group.add_mutually_exclusive_group().add_argument
    rows = "most rows from one rank to one expert, or none: no limit [the preset's, by its factor if it has one; none]"
    limit("--capacity", type=_capacity, metavar="N", help=rows)
    limit("--capacity-factor", type=float, metavar="F", help="capacity = F * ceil(tokens / experts) * topk")
    add("--shared-ffn", type=integer(0), metavar="N", help="row length inside the shared expert [0: there is none]")
    add("--shared-gate", action=argparse.BooleanOptionalAction, default=None, help="its results times a sigmoid")
    add("--num-zero", type=integer(0), metavar="N", help="zero-computation experts, which add the token itself [0]")
    return add_source


def config_from(args: argparse.Namespace, **instead: int | None) -> MoEConfig:
    """The config that the flags describe, but for fields that are given here.

    Raises:
        UsageError: naming the flag, its value and the rule.
    """
    return at_capacity_factor(args, _config_without_factor(args, given_fields(args, **instead)))


def at_capacity_factor(args: argparse.Namespace, config: MoEConfig) -> MoEConfig:
    """The config with the capacity of --capacity-factor, if that is given."""
    if args.capacity_factor is None:
        return config
    with blaming("argument --capacity-factor"):
        return replace(config, capacity=expert_capacity(config, args.capacity_factor))


def _config_without_factor(args: argparse.Namespace, given: dict[str, Any]) -> MoEConfig:
    if args.model_config is not None:
        family = family_from(args)
        with blaming("argument --model-config"):
            fields = {"num_tokens": MODEL_TOKENS} | given
            return read_config(args.model_config, args.layer or 0, family=family, **fields)
    for flag in ("layer", "family"):
        if getattr(args, flag) is not None:
            sources = "--model-config or --checkpoint" if "checkpoint" in args else "--model-config"
            raise UsageError(f"argument --{flag}: goes with {sources}, got {getattr(args, flag)!r} without")
    try:
        return load_preset(args.preset, **given)
    except (TypeError, ValueError) as error:
        raise UsageError(in_flags(str(error))) from None


def given_fields(args: argparse.Namespace, **instead: int | None) -> dict[str, Any]:
    """Fields of a config that have a flag, or are given here."""
    fields = {field: getattr(args, flag) for field, flag in FLAGS.items() if field != "preset"} | instead
    given = {field: value for field, value in fields.items() if value is not None}
    return given | ({"capacity": None} if given.get("capacity") == NO_LIMIT else {})


def family_from(args: argparse.Namespace) -> str | None:
    """What --family says, if it is one."""
    family: str | None = args.family
    if family is not None:
        try:
            read_family(family)
        except (ValueError, OSError) as error:
            raise UsageError(f"argument --family: {error}") from None
    return family


def layer_name(args: argparse.Namespace) -> str:
    """What the layer is called in results: its preset, or the file of its model's config."""
    return str(args.model_config or args.preset)


def check_memory(config: MoEConfig, save: str | None = None) -> None:
    """Nothing, if the weights and the tokens of all ranks fit this machine, with `save` also those of their backwards;
    segments and working memory are taken only as touched.

    Raises:
        UsageError: naming what is needed and what there is.
    """
    rows = 2 * config.num_ranks * config.num_tokens * config.hidden * config.format.num_bytes
    num_bytes, what = config.num_ranks * weight_bytes(config) + rows, "the weights and tokens"
    if save is not None:
        num_bytes, what = num_bytes + rows + _backward_bytes(config, save), f"{what}, and the backwards,"
    needed, there = num_bytes / 2**30, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    if needed > there:
        raise UsageError(
            f"{what} of {config.num_ranks} ranks need {needed:,.0f} GiB, and this machine has "
            f"{there:,.0f} GiB: choose smaller sizes, or see what they need with `flashmoe plan`"
        )


def _backward_bytes(config: MoEConfig, save: str) -> int:
    """Of all ranks: weights transposed, what a call keeps, and gradients of two backwards, as the first is checked."""
    plan = make_plan(config, save=save).backward
    assert plan is not None
    return config.num_ranks * (plan.transposed_bytes + 2 * plan.gradient_bytes) + plan.kept_total_bytes
