"""The layers behind the operator: one for each kind of layer, which all modules of that kind share, and their weights.

Tensors are known by where they are and by their versions, so that a graph needs no module to find its weights, and an
optimizer's step is noticed. Packed weights go when the memory of the tensors that they were made of does.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from reference import MoEConfig, Weights

from ..errors import FlashMoEError
from ..heap.tensors import as_array
from ..layer.layer import FlashMoE
from ..layer.packed import PackedWeights
from .description import TICKET, config_of, read, views

Place = tuple[str, int | None, tuple[int, ...]]  # description, num_topk, addresses


@dataclass
class Shared:
    """A layer, and those of its packed weights that nobody uses at the moment."""

    layer: FlashMoE
    spare: list[PackedWeights] = field(default_factory=list)


@dataclass
class Entry:
    """Packed weights, and the versions that the tensors had when they were packed."""

    shared: Shared
    packed: PackedWeights
    stamp: tuple[int, ...]

    def fits(self, stamp: tuple[int, ...]) -> bool:
        """Can it be used for tensors of these versions?"""
        return self.stamp == stamp and not self.shared.layer.closed


class Session:
    """All layers that a process runs for PyTorch."""

    def __init__(self) -> None:
        self._entries: dict[Place, Entry] = {}
        self._shared: dict[tuple[MoEConfig, str], Shared] = {}
        self._lock = threading.RLock()

    def entry(self, description: str, tensors: Sequence[torch.Tensor], num_topk: int | None = None) -> Entry:
        """The packed weights of these tensors, made or made anew where there are none or where they have changed."""
        names, fields = read(description)
        num_topk = None if "num_topk" in fields else num_topk
        place, stamp = _place(description, tensors, num_topk), _stamp(tensors)
        found = self._entries.get(place)
        if found is not None and found.fits(stamp):
            return found
        with self._lock:
            found = self._entries.get(place)  # another thread may have made it meanwhile
            if found is not None and found.fits(stamp):
                return found
            if TICKET in names:
                raise FlashMoEError(NOT_HERE if found is None else CLOSED if found.shared.layer.closed else CHANGED)
            weights = views(names, tensors, fields)
            if found is not None and not found.shared.layer.closed:
                found.shared.layer.load(as_weights(weights, found.shared.layer.config), found.packed)
                found.stamp = stamp
                return found
            return self._keep(place, tensors, self._make(config_of(fields, weights, num_topk), weights))

    def hand_over(self, plain: tuple[str, Sequence[torch.Tensor]], told: tuple[str, Sequence[torch.Tensor]]) -> Entry:
        """The packed weights of the first (description, tensors), found by the second: see ownership.py."""
        description, tensors = plain
        names, fields = read(description)
        with self._lock:
            weights = views(names, tensors, fields)
            entry = self._make(config_of(fields, weights, None), weights)
            return self._keep(_place(*told, None), told[1], entry)

    def _keep(self, place: Place, tensors: Sequence[torch.Tensor], entry: Entry) -> Entry:
        """Have the entry found by these tensors, for as long as the memory of all of them is there."""
        entry.stamp = _stamp(tensors)
        self._entries[place] = entry
        for tensor in tensors:
            weakref.finalize(tensor.untyped_storage(), self._drop, place).atexit = False
        return entry

    def _make(self, config: MoEConfig, tensors: dict[str, torch.Tensor]) -> Entry:
        self.release()
        device = tensors["up_proj"].device
        weights, key = as_weights(tensors, config), (config, str(device))
        shared = self._shared.get(key)
        if shared is None:
            shared = self._shared[key] = Shared(_make_layer(config, weights, device))
            return Entry(shared, shared.layer.packed, ())
        if not shared.spare:
            return Entry(shared, shared.layer.pack(weights), ())
        shared.layer.load(weights, shared.spare[-1])
        return Entry(shared, shared.spare.pop(), ())

    def _drop(self, place: Place) -> None:
        """Called wherever the last tensor goes, maybe inside a call: so it takes no lock and closes nothing."""
        entry = self._entries.pop(place, None)
        own = None if entry is None else getattr(entry.shared.layer, "packed", None)  # None: it is closed
        if entry is not None and entry.packed is own:  # the layer keeps these in any case
            entry.shared.spare.append(entry.packed)

    def release(self) -> None:
        """Close the layers whose weights are all gone, and let go of those that an error has closed."""
        with self._lock:
            used = {id(entry.shared) for entry in list(self._entries.values())}
            for key, shared in list(self._shared.items()):
                if shared.layer.closed or id(shared) not in used:
                    del self._shared[key]
                    shared.layer.close()


NOT_HERE = (
    'the weights of a module with own="packed" are not here: it was copied or moved. Make the copy before its weights '
    'are handed over, or load its state_dict into a module of its own'
)  # fmt: skip
CLOSED = (
    'the layer of a module with own="packed" was closed, because a call was interrupted or given up. Its weights are '
    "whole: module.load_state_dict({}, strict=False) packs them for another layer, also those of modules inside it"
)
CHANGED = (
    'the router or a bias of a module with own="packed" was changed in place, which its packed weights do not follow: '
    "change them by load_state_dict"
)


def _place(description: str, tensors: Sequence[torch.Tensor], num_topk: int | None) -> Place:
    return description, num_topk, tuple(tensor.data_ptr() for tensor in tensors)


def _stamp(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Tensors made under inference_mode count no versions."""
    return tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)


def as_weights(tensors: dict[str, torch.Tensor], config: MoEConfig) -> Weights:
    """`Weights` of tensors under its names, on the host the same memory; a router that is missing is zeros."""
    arrays: dict[str, Any] = {name: as_array(name, tensor.cpu()) for name, tensor in tensors.items()}
    if "router" not in arrays:
        arrays["router"] = as_array("router", torch.zeros(config.num_choices, config.hidden))
    return Weights(num_zero=config.num_zero, **arrays)


def _make_layer(config: MoEConfig, weights: Weights, device: torch.device) -> FlashMoE:
    if device.type == "cpu":
        return FlashMoE(config, weights)
    if device.type == "cuda":
        return FlashMoE(config, weights, backend="cuda", device=device.index)
    raise ValueError(f"tensors must be on the host (cpu) or a CUDA GPU, got device {str(device)!r}")


SESSION = Session()  # operators are functions: what they share has no other place


def release() -> None:
    """Close the layers that no module uses any more: their threads and segments go. It also happens as others begin."""
    SESSION.release()
