"""The layer's own arrays for all ranks, watched.

They are made once; every run begins with them as a new layer has them, and with NaN bits where a new layer has whatever
was there.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from reference import Layout, MoEConfig
from reference.plan import max_tasks

from ...backends.fibers import FiberBackend
from ...device.storage import as_storage
from ...heap.rank import Rank
from ...kernel.state import Experts, Problem
from .memory import NEVER, Memory, Region
from .spec import WorldSpec

ARRIVES = 64  # stores arrive within this part of a deadline
FAIR = 20  # where all is fair, every fiber comes round at least so often in a deadline


def patience(spec: WorldSpec) -> tuple[int, int]:
    """Switches until a store is seen by all, and the longest turn that is fair: a deadline is long beside both."""
    return (NEVER, NEVER) if spec.deadline is None else (spec.deadline // ARRIVES, spec.deadline // FAIR)


class Arrays:
    """What the kernel works on, made once for many runs.

    Args:
        kernel: an interpreted kernel package whose verbs are `watched`.
    """

    def __init__(self, spec: WorldSpec, kernel: ModuleType) -> None:
        c = spec.config
        self.spec, self.kernel, self.data = spec, kernel, spec.calls()
        self.weights = spec.weights()
        self.num_blocks = spec.num_processors + 1
        self.num_lanes = c.num_ranks * self.num_blocks * spec.lanes
        self.can_stop = bool(spec.leavers) or spec.deadline is not None  # if not, hosts have nothing to look for
        hosts = c.num_ranks + len(spec.leavers) if self.can_stop else 0  # those that look, then those that give up
        self.memory = Memory(self.num_lanes + hosts, *patience(spec))
        self.regions: dict[int, Region] = {}  # by id of the array
        self.backend = _WatchedBackend()
        segments = [np.empty(Layout(c).num_bytes, np.uint8) for _ in range(c.num_ranks)]
        self.ranks = [self._make_rank(rank_idx, segments) for rank_idx in range(c.num_ranks)]
        self._make_tokens()

    def _make_rank(self, rank_idx: int, segments: list[np.ndarray]) -> Rank:
        c, spec = self.spec.config, self.spec
        weights = self.weights.shard(rank_idx, c.num_ranks)
        events = max_tasks(c) + c.num_experts
        packed = spec.packing == "sources"
        rank = Rank(c, rank_idx, weights, segments, spec.num_processors, self.backend, events, packed)
        for group in (rank.segments, rank.tokens, rank.received, rank.queue):
            for name, array in zip(group._fields, group, strict=True):
                self._watch(rank_idx, f"{type(group).__name__.lower()}.{name}", array)
        rooms = self.backend.make_rooms(c, rank.first_arguments())
        for block, room in enumerate(rooms):
            self._watch(rank_idx, f"box of block {block}", room.box)
            self._watch(rank_idx, f"trace of block {block}", room.trace)
        for block, room in enumerate(rooms[: spec.num_processors]):
            self._watch(rank_idx, f"scratch.rows of block {block}", room.scratch.rows)
            self._watch(rank_idx, f"scratch.sums of block {block}", room.scratch.sums)
        return rank

    def _watch(self, rank_idx: int, name: str, array: np.ndarray) -> None:
        group, _, what = name.partition(".")
        rows = name in ("segments.dispatch", "segments.result")
        initialised = not rows and not any(array is other for other in self.backend.uninitialised)
        writers = self.spec.config.num_ranks if rows or (group == "segments" and what.endswith("_flag")) else 0
        full_name = f"rank {rank_idx} {name}"
        self.regions[id(array)] = self.memory.region(full_name, array, initialised=initialised, num_writers=writers)

    def _make_tokens(self) -> None:
        for epoch, (x, _) in enumerate(self.data, start=1):
            for rank_idx, part in enumerate(x):
                adopted = as_storage(part), as_storage(np.empty_like(part))
                self.backend.adopted[id(part)] = (*adopted, adopted[1].view(part.dtype).reshape(part.shape))
                self.backend.uninitialised.append(adopted[1])
                self._watch(rank_idx, f"tokens.x of call {epoch}", adopted[0])
                self._watch(rank_idx, f"tokens.y of call {epoch}", adopted[1])

    def watched(self, value: Any) -> Any:
        """Kernel arguments with regions for arrays; sizes, and weights, which nobody writes, stay as they are."""
        if isinstance(value, np.ndarray):
            return self.regions[id(value)]
        if isinstance(value, tuple) and not isinstance(value, Experts | Problem):
            parts = [self.watched(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        return value


class _WatchedBackend(FiberBackend):
    """Remembers which arrays begin with whatever was there, and has room for the results of every call ready."""

    def __init__(self) -> None:
        super().__init__()
        self.uninitialised: list[np.ndarray] = []
        self.adopted: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def empty(self, size: int, dtype: Any) -> np.ndarray:
        self.uninitialised.append(super().empty(size, dtype))
        return self.uninitialised[-1]

    def make_scratch(self, config: MoEConfig) -> Any:
        scratch = super().make_scratch(config)
        self.uninitialised += scratch
        return scratch

    def adopt(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.adopted[id(x)]
