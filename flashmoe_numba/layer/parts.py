"""What a layer is made of in this process, and how that is set up: together with all ranks, step by step."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from pathlib import Path

from reference import Layout, Weights
from reference.backward_plan import max_weight_tasks
from reference.cache_folder import usable_cache_folder
from reference.sizes import max_put_bytes, max_tasks

from ..backends import make_backend
from ..backends.protocols import Backend
from ..heap.protocols import Heap
from ..heap.rank import Rank
from .arguments import LayerSettings
from .packed import PackedWeights
from .saved import SavedCall


class Parts:
    """Ranks, and what they stand on.

    Attributes:
        heap: None once the layer is closed, which has no ranks and no weights then.
        all_here: a call takes and returns the tokens of all ranks, and not those of this process's one.
        layout: of every rank's segment.
        ranks: those of this process.
        num_processors: of each rank.
        packed: the weights that the layer was made with.
        held: what users have of this layer, some of which goes with it.
    """

    def __init__(self, settings: LayerSettings, heap: Heap, backend: Backend) -> None:
        """All steps that take memory or compile, each with all ranks."""
        self.config, self.backend = settings.config, backend
        self.layout = Layout(settings.config, settings.save, not heap.hosts.is_one)
        self.heap: Heap | None = heap
        self.held: weakref.WeakSet[PackedWeights | SavedCall] = weakref.WeakSet()
        self.all_here = heap.all_here
        folder = Path(heap.from_first(lambda: str(usable_cache_folder())))
        _one_first(heap, lambda: backend.load(folder, settings.save is not None))
        self.num_processors = heap.together(lambda: self._processors(settings.num_processors, heap))
        heap.allocate(self.layout.num_bytes, backend)
        self.ranks = heap.together(lambda: self._make_ranks(settings, heap))
        wires, most_bytes = [rank.segments.wire for rank in self.ranks], max_put_bytes(settings.config, settings.save)
        heap.together(lambda: heap.carry(self.layout.control, wires, most_bytes))
        of_ranks = [rank.first_arguments() for rank in self.ranks]
        _one_first(heap, lambda: backend.prepare(self.config, of_ranks, folder))
        experts = [rank.experts for rank in self.ranks]
        self.packed: PackedWeights | None = heap.together(
            lambda: PackedWeights(self.config, self.ranks, settings.weights, experts)
        )
        self.held.add(self.packed)
        if settings.save is not None:
            first = self.ranks[0].first_backward(self.packed.outlines[0], self.packed.transposed[0])
            _one_first(heap, lambda: backend.prepare_backward(first, folder))

    def _processors(self, wanted: int | None, heap: Heap) -> int:
        here = len(heap.rank_indices)
        sharing = max(here, len(heap.hosts.sharing(heap.rank_indices[0])))
        num_processors = wanted or self.backend.default_processors(here, sharing)
        self.backend.check_grid(here, num_processors)
        return num_processors

    def _make_ranks(self, settings: LayerSettings, heap: Heap) -> list[Rank]:
        config = self.config
        events = max_tasks(config) + config.num_experts if settings.trace else 0
        events += max_weight_tasks(config) if events and settings.save else 0
        packed, shard = settings.packing == "sources", settings.weights.shard
        more = self.num_processors, self.backend, events, packed, settings.save, heap.hosts
        return [Rank(config, i, shard(i, config.num_ranks), heap.segments_of(i), *more) for i in heap.rank_indices]

    def own(self, name: str, packed: PackedWeights | None) -> PackedWeights:
        """`packed`, or the weights that the layer was made with.

        Raises:
            ValueError: it is not of this layer; calls it `name`.
        """
        packed = self.packed if packed is None else packed
        if isinstance(packed, PackedWeights) and packed.fits(self.ranks):
            return packed
        found = "that of another layer" if isinstance(packed, PackedWeights) else type(packed).__name__
        hint = ": layer.pack(weights)?" if isinstance(packed, Weights) else ""
        raise ValueError(f"{name} must be what pack() of this layer returned, got {found}{hint}")

    def drop(self) -> None:
        """Keep nothing of what ranks and heap hold, here or where users hold parts of it."""
        for part in self.held:
            part.let_go()
        self.ranks.clear()  # those parts have this list, too
        self.heap, self.packed = None, None


def set_up(settings: LayerSettings, heap: Heap, backend: Backend | None = None) -> Parts:
    """The parts of a layer with these settings. Where they cannot be made, backend and heap are closed.

    Args:
        heap: without segments yet.
        backend: where the settings name none.

    Raises:
        TypeError, ValueError: naming the argument, its value and the rule.
        TimeoutError: not all ranks came.
    """
    made = [] if backend is None else [backend]

    def make() -> None:
        if settings.backend is not None:
            first_rank, how = heap.rank_indices[0], settings.backend_settings
            made.append(make_backend(settings.backend, settings.config, first_rank, heap.hosts, **how))

    try:
        heap.together(lambda: settings.check(heap))  # the other ranks must hear of a problem, too
        heap.agree(None, same=settings.shared())
        heap.together(make)
        return Parts(settings, heap, made[0])
    except BaseException:
        with contextlib.suppress(Exception):  # what failed may fail again, and must not hide it
            for each in made:
                each.close()
        with contextlib.suppress(Exception):
            heap.close(None)
        raise


def _one_first(heap: Heap, step: Callable[[], None]) -> None:
    """Take a step that may compile: one rank of a machine does, the others then find its kernel on the disk."""
    first = heap.rank_indices[0] == heap.first_here
    heap.together(lambda: step() if first else None)
    heap.together(lambda: None if first else step())
