"""The layers behind the operator: one for each kind of layer, which all modules of that kind share, and their weights.

Tensors are known by where they are and by their versions, so that a graph needs no module to find its weights, and an
optimizer's step is noticed. Packed weights go when the memory of the tensors that they were made of does.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from reference import MoEConfig, Weights

from ..errors import FlashMoEError
from ..heap.tensors import as_array
from ..layer.layer import FlashMoE
from ..layer.packed import PackedWeights
from .description import TICKET, TRAINING, config_of, read, views
from .ranks import Ranks

PLAIN = torch.Tensor, torch.nn.Parameter  # tensors that no graph is traced with
Place = tuple[str, int | None, tuple[int, ...]]  # description, num_topk, addresses


@dataclass
class Shared:
    """A layer, the ranks that it has (None: this process alone), packed weights that nobody uses at the moment, and
    what waits for a backward.
    """

    layer: FlashMoE
    ranks: Ranks | None
    spare: list[PackedWeights] = field(default_factory=list)
    kept: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)


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
        self._shared: dict[tuple[MoEConfig, str, str | None, str | None], Shared] = {}
        self._ranks: dict[str, Ranks] = {}
        self._lock = threading.RLock()
        self._hears_of_steps = False

    def ranks(self, comm: Any, process_group: Any) -> Ranks | None:
        """Those of a communicator or a process group, made where there are none or where a call failed.

        Raises:
            TypeError, ValueError, TimeoutError: as `Ranks` does.
        """
        if comm is None and process_group is None:
            return None
        for ranks in self._ranks.values():
            if ranks.is_of(comm, process_group) and ranks.over is None:
                return ranks
        made = Ranks(f"ranks {len(self._ranks)}", comm, process_group)
        return self._ranks.setdefault(made.name, made)

    def ranks_of(self, fields: Mapping[str, Any]) -> Ranks | None:
        """Those of a description's fields."""
        return self.ranks_named(fields["ranks"]) if "ranks" in fields else None

    def ranks_named(self, name: str) -> Ranks:
        """Those of a name.

        Raises:
            FlashMoEError: this process has no such.
        """
        if name not in self._ranks:
            raise FlashMoEError(ELSEWHERE)
        return self._ranks[name]

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
                shared = found.shared
                shared.layer.load(as_weights(weights, shared.layer.config, shared.ranks), found.packed)
                found.stamp = stamp
                return found
            return self._keep(place, tensors, self._make(fields, weights, num_topk))

    def hand_over(self, plain: tuple[str, Sequence[torch.Tensor]], told: tuple[str, Sequence[torch.Tensor]]) -> Entry:
        """The packed weights of the first (description, tensors), found by the second: see ownership.py."""
        description, tensors = plain
        names, fields = read(description)
        ranks = self.ranks_of(fields)
        with self.ending(ranks), nullcontext() if ranks is None else ranks.calling, self._lock:
            entry = self._make(fields, views(names, tensors, fields), None)
            return self._keep(_place(*told, None), told[1], entry)

    def _keep(self, place: Place, tensors: Sequence[torch.Tensor], entry: Entry) -> Entry:
        """Have the entry found by these tensors, for as long as the memory of all of them is there."""
        if not self._hears_of_steps:
            register_optimizer_step_post_hook(self._count_step)
            self._hears_of_steps = True
        entry.stamp = _stamp(tensors)
        self._entries[place] = entry
        for tensor in tensors:
            weakref.finalize(tensor.untyped_storage(), self._drop, place).atexit = False
        return entry

    @torch.compiler.disable
    def _count_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """After any optimizer's step: count it as a change of the tensors here, which PyTorch's fused ones do not."""
        places = {address for _, _, addresses in list(self._entries) for address in addresses}
        parameters = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        stepped = [tensor for tensor in parameters if type(tensor) in PLAIN and tensor.grad is not None]
        changed = [tensor for tensor in stepped if tensor.data_ptr() in places and not tensor.is_inference()]
        torch.autograd.graph.increment_version(changed)

    def _make(self, fields: Mapping[str, Any], tensors: dict[str, torch.Tensor], num_topk: int | None) -> Entry:
        ranks = self.ranks_of(fields)
        config = config_of(fields, tensors, num_topk, 1 if ranks is None else ranks.num_ranks)
        device = tensors["up_proj"].device
        save: str | None = fields.get(TRAINING)
        weights, key = as_weights(tensors, config, ranks), (config, str(device), fields.get("ranks"), save)
        self.release()
        shared = self._shared.get(key)
        if shared is None:
            if ranks is not None:
                ranks.meet_to_make()
            self.release(ranks)
            shared = self._shared[key] = Shared(_make_layer(config, weights, device, ranks, save), ranks)
            return Entry(shared, shared.layer.packed, ())
        if not shared.spare:
            return Entry(shared, shared.layer.pack(weights), ())
        shared.layer.load(weights, shared.spare[-1])
        return Entry(shared, shared.spare.pop(), ())

    def _drop(self, place: Place) -> None:
        """Called wherever the last tensor goes, maybe inside a call: so it takes no lock and closes nothing."""
        entry = self._entries.pop(place, None)
        with suppress(FlashMoEError):  # the layer is closed
            if entry is not None and entry.packed is entry.shared.layer.packed:  # it keeps these in any case
                entry.shared.spare.append(entry.packed)

    def release(self, ranks: Ranks | None = None) -> None:
        """Close the layers of these ranks whose weights are all gone, on all ranks; and let go of any that an error has
        closed.
        """
        with nullcontext() if ranks is None else ranks.calling, self._lock:
            for key, shared in list(self._shared.items()):
                if shared.layer.closed or (shared.ranks is ranks and self._can_close(shared)):
                    del self._shared[key]
                    shared.layer.close()

    def _can_close(self, shared: Shared) -> bool:
        unused = not shared.kept and all(entry.shared is not shared for entry in list(self._entries.values()))
        return unused if shared.ranks is None else shared.ranks.all_can_release(unused)

    @contextmanager
    def ending(self, ranks: Ranks | None) -> Iterator[None]:
        """After an error in here nothing more is computed with these ranks, and the others do not wait for this one."""
        try:
            yield
        except BaseException as error:
            if ranks is not None:
                ranks.end(error)
                for shared in list(self._shared.values()):
                    if shared.ranks is ranks:
                        shared.layer.__exit__(type(error), error, None)
            raise


NOT_HERE = (
    'the weights of a module with own="packed" are not here: it was copied or moved. Make the copy before its weights '
    'are handed over, or load its state_dict into a module of its own'
)  # fmt: skip
ELSEWHERE = (
    "a module of several ranks belongs to the process that made it, and this one was pickled or exported: make it in "
    "each process, with comm or process_group"
)
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


def as_weights(tensors: dict[str, torch.Tensor], config: MoEConfig, ranks: Ranks | None = None) -> Weights:
    """`Weights` of tensors under its names, on the host the same memory; a router that is missing is zeros.

    Tensors of fewer than all experts are of those of this process's rank.
    """
    arrays: dict[str, Any] = {name: as_array(name, tensor.cpu()) for name, tensor in tensors.items()}
    if "router" not in arrays:
        arrays["router"] = np.zeros((config.num_choices, config.hidden), config.numpy_dtype)
    all_here = ranks is None or len(arrays["up_proj"]) == config.num_experts
    first = 0 if all_here or ranks is None else ranks.rank_idx * config.num_experts_per_rank
    return Weights(num_zero=config.num_zero, first_expert=first, **arrays)


def _make_layer(
    config: MoEConfig, weights: Weights, device: torch.device, ranks: Ranks | None, save: str | None
) -> FlashMoE:
    given: dict[str, Any] = {"save": save, **({} if ranks is None else ranks.given)}
    if device.type == "cpu":
        return FlashMoE(config, weights, **given)
    if device.type == "cuda" and save is not None:
        raise ValueError("train must be False for tensors on a GPU: their gradients are those of FlashMoE.backward")
    if device.type == "cuda":
        return FlashMoE(config, weights, backend="cuda", device=device.index, **given)
    raise ValueError(f"tensors must be on the host (cpu) or a CUDA GPU, got device {str(device)!r}")


SESSION = Session()  # operators are functions: what they share has no other place


def release(*, comm: Any = None, process_group: Any = None) -> None:
    """Close the layers that no module uses any more: their threads and segments go. It also happens as others begin.

    Args:
        comm, process_group: those of modules with the same, which takes all ranks; neither: those of this process.
    """
    SESSION.release(SESSION.ranks(comm, process_group))
