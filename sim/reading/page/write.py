"""One file for a browser: the template with the values of simulations in it as JSON, in the element `data`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..palette import COLOUR_OF_CATEGORY, COLOUR_OF_CAUSE, COLOUR_OF_KIND, RESIDENT
from .gather import Gathered

TEMPLATE = Path(__file__).parent / "page.html"
PLACE = "@DATA@"


def write_page(file: Path | str, rows: Sequence[Mapping[str, Any]], gathered: Sequence[Gathered]) -> None:
    """Write the page of these simulations.

    Args:
        rows: the report of each as JSON has it, with what is beside it: `preset`, `seed`, `layer`; and `trust`, if it
            has one, how far the latency is to be trusted: a share (0.1 is 10 %) or words.
        gathered: the rest of each.
    """
    colours = {"kinds": COLOUR_OF_KIND, "idle": {"resident": RESIDENT} | COLOUR_OF_CAUSE, "path": COLOUR_OF_CATEGORY}
    value = {
        "simulated": True,
        "colours": colours,
        "simulations": [{"row": row} | more for row, more in zip(rows, gathered, strict=True)],
    }
    Path(file).write_text(page(value), encoding="utf-8")


def page(value: Mapping[str, Any]) -> str:
    """The template with a value in it; no text in it can end the element that it stands in."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace(PLACE, text)
