"""Files of fitted numbers: a table per policy, a line per GPU, and beside it what it stands on."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

from ..drafting import rates
from .fit import Fit, Key

HEADER = """\
# The fitted knobs of each policy on each GPU, see rates.py.
# Written by `flashmoe validate --fit`; beside each: the rows it was fitted to, and their mean relative error.
"""


def write_rates(fits: Iterable[Fit], *, keep: bool = False) -> None:
    """The numbers into the file that `sim.drafting.rates` reads; with `keep`, beside those of others that are there."""
    lines = lines_there(rates.FILE) if keep and rates.FILE.exists() else {}
    for fit in fits:
        rows = "1 row" if fit.num_rows == 1 else f"{fit.num_rows} rows"
        lines[fit.policy, fit.gpu] = f"{fit.gpu} = {table(fit.values)} # {rows}, {fit.error:.1%}\n"
    write_lines(rates.FILE, HEADER, lines)
    rates.fitted_rates.cache_clear()


def table(values: rates.Values) -> str:
    """An inline table of TOML."""
    return "{ " + ", ".join(f"{name} = {value}" for name, value in values.items()) + " }"


def write_lines(file: Path, header: str, lines: dict[Key, str]) -> None:
    """A file of a line per policy and GPU."""
    text = header
    for policy, group in itertools.groupby(sorted(lines), key=lambda key: key[0]):
        text += f"\n[{policy}]\n" + "".join(lines[key] for key in group)
    file.write_text(text, encoding="utf-8")


def lines_there(file: Path) -> dict[Key, str]:
    """Each GPU's line with what is said beside it, by policy and GPU."""
    lines, policy = {}, ""
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.startswith("["):
            policy = line.strip().strip("[]")
        elif not line.startswith("#") and "=" in line:
            lines[policy, line.partition("=")[0].strip()] = line
    return lines
