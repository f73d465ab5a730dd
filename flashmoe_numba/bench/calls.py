"""The same calls of a layer, again and again, with the tokens of a workload."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from reference import Workload

from ..layer.gradients import Gradients
from ..layer.layer import FlashMoE
from ..layer.saved import SavedCall
from .memory import make_memory


class Call:
    """A call of one layer; results are always a list over this process's ranks.

    Args:
        in_process: all ranks are here, instead of one.
    """

    def __init__(self, layer: FlashMoE, workload: Workload, backend: str, in_process: bool) -> None:
        self._layer, self._in_process = layer, in_process
        routing = {"topk_idx": workload.topk_idx, "topk_weights": workload.topk_weights}
        given = {name: parts for name, parts in routing.items() if parts is not None}
        self._memory = make_memory(backend, layer.config)
        self._x = self._of_layer([self._memory.to_device(part) for part in workload.x])
        self._routing = {name: self._of_layer(parts) for name, parts in given.items()}
        self._y: Any = None

    def run(self) -> None:
        """One call, to its end."""
        self._y = self._layer(self._x, **self._routing)
        self._layer.synchronize()

    def keep(self) -> SavedCall:
        """One call that keeps what its backward needs, to its end."""
        self._y, saved = self._layer.forward(self._x, **self._routing)
        self._layer.synchronize()
        return saved

    def backward(self, saved: SavedCall, dy: Sequence[np.ndarray]) -> Gradients:
        """The backward of a call, to its end; `dy` is a list over this process's ranks."""
        gradients = self._layer.backward(saved, self._of_layer([self._memory.to_device(part) for part in dy]))
        self._layer.synchronize()
        return gradients

    def results(self) -> list[np.ndarray]:
        """Of the last call that was no backward, in this process's memory."""
        return [self.on_host(part) for part in self.per_rank(self._y)]

    def on_host(self, array: Any) -> np.ndarray:
        """A result or a gradient in this process's memory."""
        return self._memory.to_host(array)

    def per_rank(self, value: Any) -> list[Any]:
        """`value` of every rank here, from a property or result of the layer."""
        return list(value) if self._in_process else [value]

    def _of_layer(self, parts: Sequence[Any]) -> Any:
        """A list over this process's ranks, as the layer takes it."""
        return list(parts) if self._in_process else parts[0]


def digest(arrays: Sequence[np.ndarray]) -> bytes:
    """A hash of their bits."""
    found = hashlib.blake2b(digest_size=16)
    for array in arrays:
        found.update(array.tobytes())
    return found.digest()
