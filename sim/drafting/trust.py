"""How far simulations of a policy on a GPU were off from measurements that their fit never saw.

`flashmoe validate --folds` leaves out one (source, model) after the other, fits the numbers of `rates.py` to the rest,
and writes the errors of what was left out into trust.toml beside this file, by policy, GPU and tokens per rank.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from ..world.machine_names import gpu_kind

RANGES = ("up to 128", "up to 1024", "more")  # of tokens per rank
_ENDS = (128, 1024)
FILE = Path(__file__).with_name("trust.toml")


def token_range(tokens: int) -> str:
    """The one of `RANGES` that these tokens per rank are in."""
    return RANGES[sum(tokens > end for end in _ENDS)]


@cache
def left_out_errors() -> Mapping[str, Mapping[str, Mapping[str, float]]]:
    """The file: by policy, GPU kind and range of tokens."""
    return tomllib.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}


def trust(policy: str, hardware_name: str, tokens: int) -> float | None:
    """The mean relative error of left-out measurements, without its sign; None: nothing like it was measured.

    Args:
        hardware_name: "H100", "2x8xH100", ...; a machine of the user's own has no measurements.
        tokens: of each rank.
    """
    return left_out_errors().get(policy, {}).get(gpu_kind(hardware_name), {}).get(token_range(tokens))
