"""The flags that make a `MoEConfig`: a preset, and what is changed of it. Shared by all commands that take a layer."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from reference import ACTIVATIONS, DTYPES, MoEConfig, load_preset, preset_names
from reference.config import expert_capacity
from reference.families import read_family
from reference.pictures import picture_format
from reference.plan import weight_bytes

from ..backends import check_backend
from ..checkpoints import read_config
from ..errors import UsageError

DEFAULT_PRESET = "laptop-text"
NO_LIMIT = "none"  # of a capacity
MODEL_TOKENS = 128  # of each rank; a model's config does not say

# The flag of each field, where it is not the field's own name.
FLAGS = {
    "num_ranks": "ranks",
    "num_tokens": "tokens",
    "num_experts": "experts",
    "num_topk": "topk",
    "hidden": "hidden",
    "ffn": "ffn",
    "gated": "gated",
    "activation": "activation",
    "dtype": "dtype",
    "capacity": "capacity",
    "shared_ffn": "shared_ffn",
    "shared_gate": "shared_gate",
    "num_zero": "num_zero",
    "preset": "preset",
}


def integer(minimum: int) -> Callable[[str], int]:
    """An argparse type: an integer of at least `minimum`."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d+", text) or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be an integer >= {minimum}, got {text!r}")
        return int(text)

    return parse


def integers(minimum: int) -> Callable[[str], list[int]]:
    """An argparse type: integers of at least `minimum` with commas between them."""
    one = integer(minimum)
    return lambda text: [one(part) for part in text.split(",")]


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
    if args.model_config:
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


def in_flags(message: str) -> str:
    """A library's message with the names of flags in place of those of fields."""
    return re.sub(
        rf"\b(?:config\.)?({'|'.join(FLAGS)})\b", lambda match: f"--{FLAGS[match[1]].replace('_', '-')}", message
    )


@contextmanager
def blaming(flag: str) -> Iterator[None]:
    """Turn what is wrong with a value into an error of its flag."""
    try:
        yield
    except (TypeError, ValueError, OSError) as error:
        raise UsageError(f"{flag}: {in_flags(str(error))}") from None


def add_json_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON; with - to stdout, alone")


def give(path: str | None, lines: Iterable[str], value: dict[str, Any] | list[dict[str, Any]]) -> None:
    """A result by `--json`: lines for people unless JSON goes to stdout, and JSON where it is asked for."""
    if path != "-":
        print("\n".join(lines), flush=True)
    if path:
        write_json(path, value)


def write_json(path: str, value: dict[str, Any] | list[dict[str, Any]]) -> None:
    """To a file that was checked by `check_outputs`, or to stdout for "-"."""
    text = json.dumps(value, indent=1, allow_nan=False)
    if path == "-":
        print(text)
        sys.stdout.flush()
    else:
        Path(path).write_text(text + "\n", encoding="utf-8")


def check_outputs(paths: dict[str, str | None]) -> None:
    """See that a file can be written at each flag's path, before anything runs; "-" is stdout, for JSON only.

    A folder that is not there is made, and said to be. Nothing else is left behind. `--plot` is a picture.

    Raises:
        UsageError: naming the flag and what is wrong.
    """
    given = {flag: path for flag, path in paths.items() if path is not None}
    if "--plot" in given:
        _check_picture(given["--plot"])
    for flag, path in given.items():
        if path == "-" and flag != "--json":
            raise UsageError(f"argument {flag}: must be a file, got '-'")
        same = [other for other in given if other != flag and os.path.realpath(given[other]) == os.path.realpath(path)]
        if same:
            raise UsageError(f"argument {flag}: must not be the file of {same[0]}, got {path!r}")
        if path != "-":
            if path.endswith(os.sep):
                raise UsageError(f"argument {flag}: cannot write {path!r}: it names a folder")
            _check_writable(flag, path)


def _check_picture(path: str) -> None:
    if not importlib.util.find_spec("matplotlib"):
        raise UsageError("argument --plot: needs matplotlib, not found here: pip install 'flashmoe-numba[plots]'")
    try:
        picture_format(path)
    except ValueError as error:
        raise UsageError(f"argument --plot: {error}") from None


def _check_writable(flag: str, path: str) -> None:
    file = Path(path)
    make_folder(flag, path, file.parent)
    try:
        if file.is_fifo():  # to open and close it would tell its reader that this was all
            return
        existed = file.exists()
        file.open("a").close()
        if not existed:
            file.resolve().unlink(missing_ok=True)  # of a link, what it points to; ranks check at the same time
    except OSError as error:
        raise UsageError(f"argument {flag}: cannot write {path!r}: {error.strerror}") from None


def make_folder(flag: str, path: str, folder: Path) -> None:
    """Make the folder for a flag's path, if it is not there, and say so on stderr: it may be a slip of the pen.

    Raises:
        UsageError: it cannot be made, or is something else.
    """
    try:
        folder.mkdir(parents=True)
        print(f"flashmoe: {flag}: made the folder {str(folder)!r}, which was not there", file=sys.stderr)
    except OSError as error:
        if not folder.is_dir():
            raise UsageError(f"argument {flag}: cannot write {path!r}: {error.strerror}") from None


def check_backend_flag(name: str) -> None:
    """Raise a UsageError if this backend can run nothing here."""
    with blaming("argument --backend"):
        check_backend(name, {})


def check_memory(config: MoEConfig) -> None:
    """Nothing, if the weights and the tokens of all ranks fit this machine; segments are taken only as touched.

    Raises:
        UsageError: naming what is needed and what there is.
    """
    rows = 2 * config.num_ranks * config.num_tokens * config.hidden * config.format.num_bytes
    needed = (config.num_ranks * weight_bytes(config) + rows) / 2**30
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    if needed > there:
        raise UsageError(
            f"the weights and tokens of {config.num_ranks} ranks need {needed:,.0f} GiB, and this machine has "
            f"{there:,.0f} GiB: choose smaller sizes, or see what they need with `flashmoe plan`"
        )
