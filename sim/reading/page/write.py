"""One file for a browser: the template with the values of simulations in it as JSON, in the element `data`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...simulation import Simulation
from ..palette import COLOUR_OF_CATEGORY, COLOUR_OF_CAUSE, COLOUR_OF_KIND, RESIDENT
from ..places import compared
from ..report import report
from .gather import Gathered, gather

TEMPLATE = Path(__file__).parent / "page.html"
PLACE = "@DATA@"
WORLD = ("hardware", "precision", "routing", "passes", "tokens")  # what is compared has these in common, as on the page


def write_page(simulations: Sequence[Simulation], file: Path | str) -> None:
    """Write the page of some simulations.

    Raises:
        ValueError: there are none, or their runs were not kept.
    """
    rows = compared([asdict(report(one)) for one in simulations], lambda row: tuple(row[name] for name in WORLD))
    join(rows, [gather(one, len(simulations)) for one in simulations], file)


def join(rows: Sequence[Mapping[str, Any]], gathered: Sequence[Gathered], file: Path | str) -> None:
    """Write the page of what was gathered.

    Args:
        rows: the report of each as JSON has it, with what is beside it: `preset`, `seed`, `layer`, and its place
            (`over_fastest`, `tie`). Its `left_out_error` may be words, too.
    """
    if not rows:
        raise ValueError("a page must have at least one simulation, got none")
    colours = {"kinds": COLOUR_OF_KIND, "idle": {"resident": RESIDENT} | COLOUR_OF_CAUSE, "path": COLOUR_OF_CATEGORY}
    simulations = [{"row": row} | more for row, more in zip(rows, gathered, strict=True)]
    value = {"simulated": True, "colours": colours, "simulations": simulations}
    Path(file).write_text(page(value), encoding="utf-8")


def page(value: Mapping[str, Any]) -> str:
    """The template with a value in it; no text in it can end the element that it stands in."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace(PLACE, text)
