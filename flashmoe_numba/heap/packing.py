"""A rank's weights in the order in which its kernel reads them."""

from __future__ import annotations

from typing import Any

import numpy as np

from reference import MoEConfig, Weights

from ..kernel.state import Experts, Received, Segments, Tokens
from .back import Transposed, Working, pack_transposed
from .protocols import Memory
from .rules import fill_kinds, make_kinds


class Packing:
    """Of one rank, whose arrays these are: they hold the rows that the weights will multiply.

    Attributes:
        memory: the rank's.
    """

    def __init__(
        self,
        config: MoEConfig,
        memory: Memory,
        segments: Segments,
        tokens: Tokens,
        received: Received,
        working: Working | None,
    ) -> None:
        self._config, self.memory, self._kinds = config, memory, make_kinds(config)
        self._dispatch, self._hidden, self._shared_hidden = segments.dispatch, received.hidden, tokens.shared_hidden
        self._working = working

    def pack(self, weights: Weights, into: Experts | None = None) -> Experts:
        """Weights in the form of the backend's tile GEMM, told which rows they will multiply where these stay put.

        Args:
            weights: the experts of this rank only.
            into: what this returned for other weights, to be filled anew; None: take memory.
        """
        router = self._factors(weights.router, into and into.router)
        up, down = self._pack(weights, self._dispatch, self._hidden, into and (into.up, into.down))
        shared_up, shared_down, shared_gate = up, down, router
        if weights.shared is not None:  # its rows lie elsewhere in each call: `aim`
            old = into and (into.shared_up, into.shared_down)
            shared_up, shared_down = self._pack(weights.shared, self._dispatch, self._shared_hidden, old)
        if weights.shared_gate_weight is not None:
            shared_gate = self._factors(weights.shared_gate_weight[None], into and into.shared_gate)
        return Experts(
            router=router,
            up=up,
            down=down,
            shared_up=shared_up,
            shared_down=shared_down,
            shared_gate=shared_gate,
            **fill_kinds(self._kinds, weights, self.memory, into)._asdict(),
        )

    def _pack(self, weights: Weights, rows: Any, hidden: Any, into: tuple[Any, Any] | None) -> tuple[Any, Any]:
        """(up, down) of these experts, and what they multiply."""
        c, pack = self._config, self.memory.pack
        old_up, old_down = into or (None, None)
        ups, up_biases = zip(*weights.ups, strict=True)
        up = pack(ups, up_biases, c.tile_ffn, c.accumulator, rows, old_up)
        return up, pack([weights.down_proj], [weights.down_bias], c.tile_n, c.accumulator, hidden, old_down)

    def _factors(self, matrix: np.ndarray, into: Any) -> Any:
        """A matrix whose products stay in the accumulator's type."""
        c = self._config
        return self.memory.pack([matrix.astype(c.accumulator)[None]], [None], c.tile_n, c.accumulator, None, into)

    def transpose(self, weights: Weights, experts: Experts, into: Transposed | None = None) -> Transposed:
        """The same as a backward multiplies by them.

        Args:
            experts: what `pack` returned for them.
        """
        assert self._working is not None, "the layer was made for it"
        return pack_transposed(self._config, self.memory, weights, experts, self._dispatch, self._working, into)


def unpack(memory: Memory, experts: Experts, weights: Weights) -> None:
    """The matrices of what `Packing.pack` returned, but for the router, written into those of `weights`."""
    memory.unpack(experts.up, [matrix for matrix, _ in weights.ups])
    memory.unpack(experts.down, [weights.down_proj])
    if weights.shared is not None:
        memory.unpack(experts.shared_up, [matrix for matrix, _ in weights.shared.ups])
        memory.unpack(experts.shared_down, [weights.shared.down_proj])
