"""A picture of one call: what every block of every rank did, on one axis of time. Needs matplotlib (extra `plots`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reference import COMBINE, DISPATCH, GATE, GEMM0, GEMM1

from .kernel.trace import RECEIVE
from .trace import TRACE_KIND_NAMES, TraceRecord, block_name

# Okabe and Ito's colours, told apart by everybody.
COLOURS = {
    GATE: "#CC79A7",
    DISPATCH: "#E69F00",
    GEMM0: "#0072B2",
    GEMM1: "#56B4E9",
    COMBINE: "#009E73",
    RECEIVE: "#D55E00",
}


def plot_timeline(records: Sequence[TraceRecord], num_processors: int, file: Path) -> None:
    """Write a PNG: one lane per block, rank 0 on top, one colour per kind, milliseconds since the first slice.

    Raises:
        ImportError: matplotlib is missing; names the extra.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'flashmoe-numba[plots]'") from error
    lanes = sorted({(record.rank, record.block) for record in records})
    figure = Figure(figsize=(12, 1.4 + 0.28 * len(lanes)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw_slices(axes, records, lanes)
    _label(axes, lanes, num_processors)
    figure.savefig(file)
