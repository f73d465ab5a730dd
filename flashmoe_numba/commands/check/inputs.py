"""Layers to check, with tokens and a routing: sizes are drawn from a seed, and all data follows from sizes and seed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from reference import MoEConfig, Weights, moe_layer
from reference.arrays import Array, stream
from reference.error_bounds import absolute_terms

from .target import Call

DATA_STREAM = 2  # those of weights are 0 and 1
MOST_TOKENS, MOST_COLUMNS, MOST_EXPERTS = 40, 130, 9


@dataclass(frozen=True)
class Kind:
    """What all cases of a check have in common; hidden and ffn are multiples of `multiple`."""

    dtype: str = "float32"
    gated: bool = True
    activation: str = "silu"
    bias: bool = False
    multiple: int = 1


@dataclass(frozen=True, kw_only=True)
class Case:
    """The sizes of one layer and its batch, and the seed of what they hold."""

    num_tokens: int
    hidden: int
    ffn: int
    num_experts: int
    num_topk: int
    seed: int

    def __str__(self) -> str:
        sizes = f"{self.num_tokens} tokens, hidden {self.hidden}, ffn {self.ffn}"
        return f"{sizes}, top {self.num_topk} of {self.num_experts} experts, seed {self.seed}"


def draw_case(rng: np.random.Generator, kind: Kind) -> Case:
    """Any sizes, small ones as often as large ones, few of them round."""
    num_experts = _up_to(rng, MOST_EXPERTS)
    columns = max(1, MOST_COLUMNS // kind.multiple)
    return Case(
        num_tokens=_up_to(rng, MOST_TOKENS),
        hidden=kind.multiple * _up_to(rng, columns),
        ffn=kind.multiple * _up_to(rng, columns),
        num_experts=num_experts,
        num_topk=_up_to(rng, num_experts),
        seed=int(rng.integers(2**31)),
    )


def _up_to(rng: np.random.Generator, most: int) -> int:
    return min(most, int(2 ** rng.uniform(0, np.log2(most + 1))))


@dataclass(frozen=True)
class Inputs:
    """One layer, and what it is called with: `x` `[num_tokens, hidden]`, routing `[num_tokens, num_topk]`."""

    config: MoEConfig
    weights: Weights
    x: Array
    topk_idx: Array
    topk_weights: Array

    @cached_property
    def expected(self) -> Array:
        """The oracle's result, float64."""
        y: Array = moe_layer([self.x], self.weights, self.config, [self.topk_idx], [self.topk_weights])[0]
        return y

    @cached_property
    def terms(self) -> Array:
        """What errors are measured in (`absolute_terms`)."""
        return absolute_terms([self.x], self.weights, self.config, [self.topk_idx], [self.topk_weights])[0]

    def call(self, rows: slice = slice(None), strided: bool = False) -> Call:
        """The call of these rows of the batch."""
        return Call(self.x[rows], self.topk_idx[rows], self.topk_weights[rows], strided)

    def scaled(self, factors: Array) -> Inputs:
        """Each row of x times its factor `[num_tokens]`."""
        return replace(self, x=(self.x.astype(np.float64) * factors[:, None]).astype(self.x.dtype))


def make_inputs(case: Case, kind: Kind) -> Inputs:
    """Normal numbers, and different experts for each token; routing weights are used as they are, so of any sum."""
    config = MoEConfig(
        num_ranks=1,
        num_tokens=max(1, case.num_tokens),
        hidden=case.hidden,
        ffn=case.ffn,
        num_experts=case.num_experts,
        num_topk=case.num_topk,
        gated=kind.gated,
        activation=kind.activation,
        dtype=kind.dtype,
    )
    rng = stream(case.seed, DATA_STREAM)
    x = rng.standard_normal((case.num_tokens, case.hidden)).astype(config.numpy_dtype)
    order = np.argsort(rng.random((case.num_tokens, case.num_experts)), axis=1)
    factors = rng.uniform(0.1, 1, (case.num_tokens, case.num_topk))
    weights = Weights.random(config, case.seed, bias=kind.bias)
    return Inputs(config, weights, x, order[:, : case.num_topk].astype(np.int64), factors.astype(config.accumulator))
