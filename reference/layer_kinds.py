"""What kind of router and of experts a layer has, as values: the words in which every other module asks for them.

A config has one of each, made from its public fields. What a kind computes is in `routers` and `experts`. Leaves out:
biases, which weights have or not, of any kind of expert.
"""

from __future__ import annotations

from dataclasses import dataclass

from .activations import ACTIVATIONS


@dataclass(frozen=True, kw_only=True)
class RouterKind:
    """How logits become experts and their weights.

    Args:
        score: of an expert, from a token's logits; a key of `routers.CHOICES`.
        renormalize: divide the chosen scores by their sum.
    """

    score: str
    renormalize: bool


@dataclass(frozen=True, kw_only=True)
class ExpertKind:
    """What an expert computes between its up and its down matrices.

    Args:
        activation: one of `ACTIVATIONS`.
        gated: two up matrices, `act(gate) * up`, instead of one.
    """

    activation: str
    gated: bool

    @property
    def activation_idx(self) -> int:
        """The activation as kernels know it: its index in `ACTIVATIONS`."""
        return ACTIVATIONS.index(self.activation)

    @property
    def num_ups(self) -> int:
        """Up matrices: columns of the first product for each column of the hidden rows."""
        return 1 + self.gated

    @property
    def num_matrices(self) -> int:
        return self.num_ups + 1

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the matrices in `Weights`, without `_proj`."""
        return ("up", "down", "gate") if self.gated else ("up", "down")
