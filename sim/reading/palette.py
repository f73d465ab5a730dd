"""Colours that mean the same in all pictures and pages: of kinds of tasks, of causes, of what time went into.

The kinds of the kernel have the colours of its own pictures (`reference.traces.COLOURS`); all others differ from them.
"""

from __future__ import annotations

from reference.traces import COLOURS

from ..engine.kinds import BARRIER, DENSE, ELEMENTWISE, EPILOGUE, JOIN, KIND_NAMES, LAUNCH, LOAD, PERMUTE, SEND
from .explain import CATEGORIES
from .measures import IDLE_CAUSES

KIND_COLOURS = COLOURS | {
    LAUNCH: "#C51B4B",
    BARRIER: "#A6761D",
    SEND: "#7B4173",
    PERMUTE: "#8C96C6",
    ELEMENTWISE: "#637939",
    DENSE: "#9ECAE1",
    JOIN: "#DDDDDD",
    LOAD: "#C7A252",
    EPILOGUE: "#66C2A4",
}
COLOUR_OF_KIND = {KIND_NAMES[kind]: colour for kind, colour in KIND_COLOURS.items()}
COLOUR_OF_CAUSE = dict(zip(IDLE_CAUSES, ("#C51B4B", "#A6761D", "#E69F00", "#CC79A7", "#A8A8A8"), strict=True))
CATEGORY_COLOURS = ("#0072B2", "#CC79A7", "#E69F00", "#D55E00", "#C51B4B", "#A6761D")
COLOUR_OF_CATEGORY = dict(zip(CATEGORIES, CATEGORY_COLOURS, strict=True))
RESIDENT = "#0072B2"
