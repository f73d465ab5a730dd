"""Flags of commands: their names, what they take, and errors that speak of them."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..backends import check_backend
from ..errors import UsageError

MOST_SECONDS = 86400.0
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


def positive(most: float, rule: str) -> Callable[[str], float]:
    """An argparse type: a number above 0 and at most `most`, as the rule says."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value <= most:
            raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}")
        return value

    return parse


seconds = positive(MOST_SECONDS, f"a number in (0, {MOST_SECONDS:g}]")  # how long to wait at most


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


def check_backend_flag(name: str) -> None:
    """Raise a UsageError if this backend can run nothing here."""
    with blaming("argument --backend"):
        check_backend(name, {})
