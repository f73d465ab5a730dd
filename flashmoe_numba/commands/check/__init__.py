"""Property tests of any Mixture-of-Experts layer, against the float64 oracle and against itself.

TARGET names a function, as package.module:name or path/file.py:name:

    def layer(x, topk_idx, topk_weights, weights):      # or make(weights), which returns
        return y                                        # layer(x, topk_idx, topk_weights)

x and y are [num_tokens, hidden] in --dtype; topk_idx [num_tokens, num_topk] is int64, topk_weights float32 (for float64
float64). weights has up_proj, gate_proj [num_experts, ffn, hidden], down_proj [num_experts, hidden, ffn], up_bias,
gate_bias, down_bias; what --gated and --bias leave out is None. With --torch all are tensors: an experts module of
transformers is what make(weights) may return. The layer must compute, for each of a token's experts e,
    topk_weights * ((act(x @ gate_proj[e].T) * (x @ up_proj[e].T)) @ down_proj[e].T)
and add them up. It runs in a process of its own. The exit status is 1 if a property fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from reference import ACTIVATIONS, DTYPES
from reference.arrays import stream

from ...errors import UsageError
from ..flags import integer, seconds
from ..outputs import add_json_argument, check_outputs, make_folder, write_json
from ..spread import progress
from .inputs import MOST_COLUMNS, Kind, draw_case, make_inputs
from .properties import PROPERTIES, Finding, Property
from .report import as_json, failures, headline, summary, table
from .saved import Saved
from .search import Result, look
from .subject import Subject, TimeLimit
from .target import Target, TargetError

NAMES = tuple(each.name for each in PROPERTIES)
ASKED_FOR = "padding"  # not every layer claims to take such choices


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `flashmoe check`."""
    add = parser.add_argument
    add("target", metavar="TARGET", help="package.module:name or path/file.py:name")
    add("--torch", action="store_true", help="it takes and returns tensors of PyTorch, on the CPU")
    add("--dtype", choices=DTYPES, default="float32", help="of x, y and weights [float32]")
    add("--gated", action=argparse.BooleanOptionalAction, default=True, help="act(gate) * up instead of act(up) [yes]")
    add("--activation", choices=ACTIVATIONS, default="silu", help="[silu]")
    add("--bias", action="store_true", help="experts have biases")
    add("--padding", action="store_true", help="it takes -1 and num_experts in topk_idx, as no choice")
    what = "hidden and ffn are multiples of N, for a layer that takes no others [1]"
    add("--multiple", type=integer(1), default=1, metavar="N", help=what)
    add("--only", type=_names, metavar="NAME[,NAME]", help=f"these properties of {', '.join(NAMES)}")
    add("--skip", type=_names, default=[], metavar="NAME[,NAME]", help="not these properties")
    add("--examples", type=integer(1), default=20, metavar="N", help="cases of each property [20]")
    add("--seed", type=integer(0), default=0, metavar="N", help="of the cases and what they hold [0]")
    what = "the longest that a few calls may take; to load the target and for a first call 10 times as long [30]"
    add("--limit-s", type=seconds, default=30.0, metavar="S", help=what)
    what = "where the inputs of what fails go, each with a script that calls the target again [flashmoe-check]"
    add("--save", type=Path, default=Path("flashmoe-check"), metavar="FOLDER", help=what)
    add_json_argument(parser)


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in NAMES:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(NAMES)}, got {name!r}")
    return names


def main(args: argparse.Namespace) -> int:
    """Check the target, and say what holds."""
    _check_folder(args.save)
    asked, kind = _asked(args), _kind(args)
    check_outputs({"--json": args.json})  # the last check of flags: it makes folders
    target = Target(args.target, args.torch, os.getcwd())
    say = print if args.json != "-" else lambda *_, **__: None
    with Subject(target, args.limit_s) as subject:
        try:
            subject.load()
        except TargetError as error:
            raise UsageError(f"argument TARGET: {error}") from None
        say(headline(target, kind, args.examples, args.seed), flush=True)
        results = [Result(each) for each in asked]
        interrupted = _look_at_all(results, kind, subject, args)
    say("\n".join(["", *table(results), ""]))
    scripts = _save(results, kind, target, args.save)
    say("\n".join([*failures(results, scripts), summary(results)]), flush=True)
    if args.json:
        write_json(args.json, as_json(target, kind, args.examples, args.seed, results, scripts))
    if interrupted:
        print("flashmoe check: interrupted", file=sys.stderr)
        return 130
    return 1 if scripts else 0


def _asked(args: argparse.Namespace) -> list[Property]:
    """The properties that the flags ask for."""
    names = args.only or [name for name in NAMES if args.padding or name != ASKED_FOR]
    asked = [each for each in PROPERTIES if each.name in names and each.name not in args.skip]
    if not asked:
        raise UsageError("argument --skip: no property is left")
    return asked


def _kind(args: argparse.Namespace) -> Kind:
    if args.multiple > MOST_COLUMNS:
        raise UsageError(f"argument --multiple: must be at most {MOST_COLUMNS}, got {args.multiple}")
    if args.torch and not importlib.util.find_spec("torch"):
        raise UsageError("argument --torch: needs PyTorch, not found here: pip install 'flashmoe-numba[torch]'")
    return Kind(args.dtype, args.gated, args.activation, args.bias, args.multiple)


def _check_folder(folder: Path) -> None:
    """Raise a UsageError if it could not be made; it is made only if something fails."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"argument --save: cannot write {str(folder)!r}: {str(there)!r} is no folder to write to")


def _look_at_all(results: Sequence[Result], kind: Kind, subject: Subject, args: argparse.Namespace) -> bool:
    """Was it interrupted?"""
    case = draw_case(stream(args.seed), kind)
    first = make_inputs(case, kind)
    try:
        subject.warm_up(first.weights, first.call())
        for result in progress(results, len(results), "properties"):
            look(result, kind, subject.run, args.examples, args.seed)
    except TimeLimit as error:
        wrong = f"{error}, to the first call of all: a target that compiles for so long needs a larger --limit-s"
        for result in results:
            result.case, result.worst = result.asked.sizes(case), Finding(math.inf, 0, wrong, hung=True)
    except KeyboardInterrupt:
        return True
    return False


def _save(results: Sequence[Result], kind: Kind, target: Target, folder: Path) -> dict[str, Path]:
    """The scripts of what fails, by property."""
    failed = [each for each in results if each.case is not None]
    if failed:
        make_folder("--save", str(folder), folder)
    scripts = {}
    for each in failed:
        assert each.case is not None
        story = f"{target.name}: {each.asked.name} fails: {each.worst.wrong} ({each.case})"
        saved = Saved(target, each.asked, each.asked.inputs(each.case, kind))
        scripts[each.asked.name] = saved.save(folder, story)
    return scripts
