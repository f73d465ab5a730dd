"""Hosts that are pretended in one process: the channels that carry puts between their ranks, among the blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..device.compilation import interpreted
from ..device.fibers import Scheduler
from .protocols import Arguments


def add_channels(
    scheduler: Scheduler, of_ranks: Sequence[Arguments], draw: Callable[[], float], is_over: Callable[[], bool]
) -> None:
    """A fiber for each two ranks on different hosts, in either direction; nothing, where all are on one.

    Args:
        of_ranks: what the blocks of all ranks are given; none of their puts is under way.
        draw: numbers in [0, 1), by which puts overtake each other.
        is_over: will no more come?
    """
    make = interpreted("flashmoe_numba.kernel").Channel
    for source in of_ranks:
        for target in of_ranks:
            if source.segments.remote[target.problem.rank_idx]:
                channel = make(source, target, int(source.segments.wire[0]), draw)
                name = f"network from rank {source.problem.rank_idx} to {target.problem.rank_idx}"
                scheduler.add_block(name, channel.carry, (is_over,))
