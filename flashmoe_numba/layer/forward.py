"""A forward call: tokens, and what comes with them, of each rank of this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..heap.rank import Rank
from ..heap.tensors import as_array
from ..kernel.grid import RankArguments
from ..kernel.state import Experts
from .given import Given, check_given, check_what_is_given
from .parts import Parts


@dataclass(frozen=True)
class Forward:
    """Checked; a rank returns its results, which its blocks fill.

    Args:
        tokens, given, experts: of each rank here.
        keep: for a backward.
    """

    tokens: Sequence[Any]
    given: Sequence[Given]
    experts: Sequence[Experts]
    keep: bool = False

    def begin(self, position: int, rank: Rank, epoch: int, deadline_ns: int) -> tuple[Any, RankArguments]:
        routing, topk_idx, logits = self.given[position]
        own = self.experts[position]
        return rank.call(self.tokens[position], routing, epoch, deadline_ns, topk_idx, logits, own, self.keep)


def check_tokens(parts: Parts, x: Any, name: str = "x") -> list[Any]:
    """Those of each rank here.

    Raises:
        TypeError, ValueError: naming the argument, its value and the rule.
    """
    of_ranks = per_rank(parts, name, x)
    check = parts.backend.check_tokens
    return [check(own, of_rank, parts.config) for own, of_rank in zip(names(parts, name), of_ranks, strict=True)]


def check_beside(parts: Parts, tokens: Sequence[Any], **arguments: Any) -> list[Given]:
    """What each rank here gets beside its tokens; errors of several ranks' arguments name the rank.

    Args:
        arguments: as `check_what_is_given` names them.

    Raises:
        TypeError, ValueError: naming the argument, its value and the rule.
    """
    check_what_is_given(parts.config, **arguments)
    none = [None] * len(tokens)
    of_ranks = {name: none if value is None else per_rank(parts, name, value) for name, value in arguments.items()}
    given = []
    for i, (rank, x) in enumerate(zip(parts.ranks, tokens, strict=True)):
        try:
            arrays = {name: as_array(name, of_rank[i]) for name, of_rank in of_ranks.items()}
            given.append(check_given(parts.config, len(x), **arrays))
        except (TypeError, ValueError) as error:
            raise type(error)(f"rank {rank.rank_idx}: {error}") from None
    return given


def names(parts: Parts, name: str) -> list[str]:
    """What errors call the entries of `per_rank`."""
    return [f"{name}[{i}]" for i in range(len(parts.ranks))] if parts.all_here else [name]


def per_rank(parts: Parts, name: str, value: Any) -> list[Any]:
    """One entry per rank of this process."""
    if not parts.all_here:
        return [value]
    if not (isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) > 0):
        raise TypeError(f"{name} must be an array or a list of arrays, got {type(value).__name__}")
    if isinstance(value, np.ndarray) and value.dtype.kind == "O":
        raise TypeError(f"{name} must be a list if parts differ in length, got an array of objects: list({name})?")
    num_ranks = parts.config.num_ranks
    if getattr(value, "ndim", None) == 2:
        hint = f": {name}[None]?" if num_ranks == 1 else ""
        rule = f"one part per rank: num_ranks={num_ranks} arrays with a row per token"
        raise ValueError(f"{name} must have {rule}, got one array of shape {list(value.shape)}{hint}")
    if len(value) != num_ranks:
        raise ValueError(f"{name} must have one part per rank: num_ranks={num_ranks}, got {len(value)}")
    return [value[rank_idx] for rank_idx in range(len(value))]  # Numba's device arrays have no iterator
