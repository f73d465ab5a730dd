"""Two simulations side by side: by what their latencies differ, cause by cause.

The causes of each are those of its critical path (`explain.py`), to the nanosecond, so their differences add up to that
of the latencies. What runs is told apart further: `products` are tiles of matrix products, whatever bounds them, and
`memory` is what moves, adds or activates rows within a GPU. Waiting for a slot is told apart by what held the slots:
products, or all else. Leaves out: what was hidden behind the path, in either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..engine.graph import TaskGraph
from ..engine.kinds import COMBINE, ELEMENTWISE, KIND_NAMES, PERMUTE
from .explain import COMPUTE, LATENCY, LAUNCHING, MEETING, RUNNING, SLOT, TRANSFER, Explanation, running

PRODUCTS, MEMORY = "products", "memory"
BEHIND_PRODUCTS, BEHIND_OTHERS = "waiting behind products", "waiting behind others"
CAUSES = (PRODUCTS, MEMORY, BEHIND_PRODUCTS, BEHIND_OTHERS, TRANSFER, LATENCY, LAUNCHING, MEETING)
IN_MEMORY = (PERMUTE, COMBINE, ELEMENTWISE)
NO_PRODUCTS = {KIND_NAMES[kind] for kind in (*IN_MEMORY, *RUNNING)}


def causes_ns(graph: TaskGraph, explanation: Explanation) -> dict[str, int]:
    """The makespan by `CAUSES`."""
    totals = explanation.totals_ns
    memory = sum(
        step.run_ns
        for step in explanation.steps
        if running(graph, step.node) == COMPUTE and graph.nodes["kind"][step.node] in IN_MEMORY
    )
    behind = round(sum(time for kind, time in explanation.behind.items() if kind not in NO_PRODUCTS))
    apart = {PRODUCTS: totals[COMPUTE] - memory, MEMORY: memory}
    apart |= {BEHIND_PRODUCTS: behind, BEHIND_OTHERS: totals[SLOT] - behind}
    return {cause: (apart | totals)[cause] for cause in CAUSES}


def shares(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, float]:
    """What part of `one - other` each cause is: they sum to 1, and may be negative; zeros if both take as long."""
    difference = sum(one.values()) - sum(other.values())
    return {cause: (one[cause] - other[cause]) / difference if difference else 0.0 for cause in CAUSES}


def difference_lines(names: tuple[str, str], one: Mapping[str, int], other: Mapping[str, int]) -> Iterator[str]:
    """A table for people: the causes of both, their difference, and its part of the whole difference."""
    total = [sum(causes.values()) for causes in (one, other)]
    words = "faster" if total[0] < total[1] else "slower"
    yield f"{names[0]} is {abs(total[0] - total[1]) / 1000:,.1f} us {words} than {names[1]}; along both critical paths,"
    yield "simulated, in us: negative is what the first takes less, and the shares are parts of the whole difference"
    widths = [max(12, len(name) + 2) for name in names]
    yield f"{'':24}{names[0]:>{widths[0]}}{names[1]:>{widths[1]}}{'difference':>12}{'share':>9}"
    parts = shares(one, other)
    for cause in CAUSES:
        yield _row(cause, one[cause], other[cause], parts[cause], widths)
    yield _row("latency of the layer", total[0], total[1], sum(parts.values()), widths)


def _row(name: str, one: int, other: int, share: float, widths: list[int]) -> str:
    times = f"{one / 1000:>{widths[0]},.1f}{other / 1000:>{widths[1]},.1f}{(one - other) / 1000:>+z12,.1f}"
    return f"{name:24}{times}{share:>z9.1%}"
