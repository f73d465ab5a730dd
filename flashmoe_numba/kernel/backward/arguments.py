"""What all blocks of a rank are given in a backward."""

from __future__ import annotations

from typing import NamedTuple

from ..grid import RankArguments
from ..state import Problem, Segments
from .state import Back, WeightGradients


class BackwardArguments(NamedTuple):
    """What `persistent_backward` has in common with `persistent`, and what it has besides.

    As words they begin with those of a forward, so that both find their epoch in one place.
    """

    forward: RankArguments
    back: Back
    gradients: WeightGradients

    @property
    def problem(self) -> Problem:
        return self.forward.problem

    @property
    def segments(self) -> Segments:
        return self.forward.segments
