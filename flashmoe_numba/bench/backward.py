"""Backwards of a benchmark: each after a call that keeps, both timed, and what is needed to check the gradients."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from reference import Weights
from reference.arrays import Array

from ..layer.gradients import Gradients
from .calls import Call, digest


@dataclass
class RankGradients:
    """Of one rank, as `FlashMoE.backward` returns them."""

    x: np.ndarray
    topk_weights: np.ndarray
    logits: np.ndarray | None
    weights: Weights

    def arrays(self) -> list[np.ndarray]:
        """All that there are."""
        every = [self.x, self.topk_weights, self.logits, *vars(self.weights).values()]
        return [array for array in every if isinstance(array, np.ndarray)]


@dataclass
class Backwards:
    """The backwards of a process, whose fields are lists over its ranks, or over iterations.

    Args:
        dy: gradients of the results, the same for every call.
        gradients: of the first backward.
        kept_bytes: of one call, by all ranks here.
        forward_ns: of the calls that keep. backward_ns: of their backwards.
        digests: a hash of all gradients of every backward, the warm-up included.
    """

    dy: list[np.ndarray]
    gradients: list[RankGradients] = field(default_factory=list)
    kept_bytes: int = 0
    forward_ns: list[int] = field(default_factory=list)
    backward_ns: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)

    def warm_up(self, call: Call) -> None:
        """One backward, whose gradients are kept."""
        saved = call.keep()
        self.kept_bytes = saved.num_bytes
        self.gradients = self._on_host(call, call.backward(saved, self.dy))
        self._note(self.gradients)

    def measure(self, call: Call, world: Any, which: str) -> None:
        """One call that keeps, and its backward.

        Args:
            which: of how many this is, for messages.
        """
        world.meet(f"before the call that keeps {which}")
        saved, forward_ns = _timed(call.keep)
        world.meet(f"before backward {which}")
        gradients, backward_ns = _timed(lambda: call.backward(saved, self.dy))
        self.forward_ns.append(forward_ns)
        self.backward_ns.append(backward_ns)
        self._note(self._on_host(call, gradients))

    @staticmethod
    def _on_host(call: Call, found: Gradients) -> list[RankGradients]:
        return of_ranks(found, call.per_rank, call.on_host)

    def _note(self, gradients: Sequence[RankGradients]) -> None:
        self.digests.append(digest([array for of_rank in gradients for array in of_rank.arrays()]))


def random_gradients(results: Sequence[np.ndarray], first_rank: int, seed: int) -> list[np.ndarray]:
    """Normal numbers in the shape and type of each rank's results; the same of a rank, wherever it runs."""
    found = []
    for rank_idx, like in enumerate(results, start=first_rank):
        numbers = np.random.default_rng([seed, rank_idx]).standard_normal(like.shape)
        found.append(numbers.astype(like.dtype))
    return found


def _timed(run: Callable[[], Any]) -> tuple[Any, int]:
    """What it returns, and how long it took, in ns."""
    start = time.perf_counter_ns()
    result = run()
    return result, time.perf_counter_ns() - start


def of_ranks(
    found: Gradients, per_rank: Callable[[Any], list[Any]], to_host: Callable[[Any], Array]
) -> list[RankGradients]:
    """What a backward returned, in this process's memory.

    Args:
        per_rank: a field of it as a list over ranks.
        to_host: an array of it in this process's memory.
    """
    gradients = []
    fields = map(per_rank, (found.x, found.topk_weights, found.logits, found.weights))
    for x, pairs, logits, weights in zip(*fields, strict=True):
        arrays = {name: to_host(array) for name, array in vars(weights).items() if hasattr(array, "dtype")}
        of_logits = None if logits is None else to_host(logits)
        gradients.append(RankGradients(to_host(x), to_host(pairs), of_logits, replace(weights, **arrays)))
    return gradients
