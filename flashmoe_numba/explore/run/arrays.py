"""The layer's own arrays for all ranks, watched.

They are made once; every run begins with them as a new layer has them, and with NaN bits where a new layer has whatever
was there.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

from reference import Layout
from reference.backward_plan import max_weight_tasks
from reference.sizes import max_tasks

from ...backends.protocols import Arguments
from ...heap.back import BackCall, Transposed, zero_gradients
from ...heap.kept import Keeping, Kept
from ...heap.rank import Rank
from ...heap.sums import LARGE
from ...kernel.backward.state import WeightGradients
from ...kernel.grid import RankArguments
from ...kernel.state import Experts, Problem
from ...tile_gemm import Panels
from .backend import WatchedBackend
from .memory import NEVER, Memory, Region
from .spec import WorldSpec

REGIONS = ("dispatch", "result", "again", "factors", "dots")
ROWS = tuple(f"segments.{name}" for name in REGIONS)  # a part for each rank
NO_DEADLINE = 1 << 62  # the scheduler finds deadlocks by itself
CHANNEL_ACTORS = 2  # of the network between two ranks (network.py)
OF_ROWS = {"dots": "row_dots", "factors": "row_factors"}  # of working memory, where segments have the same names
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
        hosts = c.num_ranks + len(spec.leavers) if spec.can_stop else 0  # those that look, then those that give up
        self.first_channel = self.num_lanes + hosts
        self.memory = Memory(self.first_channel + CHANNEL_ACTORS * len(spec.pairs_apart), *patience(spec))
        self.regions: dict[int, Region] = {}  # by id of the array
        self.images: dict[tuple[int, int], Region] = {}  # by who looks and whose: control words of a rank elsewhere
        self.backend = WatchedBackend()
        self.layout = Layout(c, spec.save, spec.hosts > 1)
        segments = [np.empty(self.layout.num_bytes, np.uint8) for _ in range(c.num_ranks)]
        self.ranks = [self._make_rank(rank_idx, segments) for rank_idx in range(c.num_ranks)]
        self.longest: Arguments = self.ranks[0].first_arguments()  # that a call's blocks are given
        self._make_tokens()
        self._transposed: list[Transposed] = []  # of each rank
        self.gradients: list[WeightGradients] = []  # the same: in which all backwards of a run go on
        if spec.save is not None:
            self._make_backwards()

    def _make_rank(self, rank_idx: int, segments: list[np.ndarray]) -> Rank:
        c, spec = self.spec.config, self.spec
        weights = self.weights.shard(rank_idx, c.num_ranks)
        events = max_tasks(c) + c.num_experts + (max_weight_tasks(c) if spec.save else 0)
        packed = spec.packing == "sources"
        how = spec.num_processors, self.backend, events, packed, spec.save, spec.of_hosts
        rank = Rank(c, rank_idx, weights, self._seen_by(rank_idx, segments), *how)
        if spec.hosts > 1:
            self._watch_stage(rank, segments[rank_idx])
        for group in (rank.segments, rank.tokens, rank.received, rank.queue):
            self._watch_all(rank_idx, type(group).__name__.lower(), group._asdict())
        rooms = self.backend.make_rooms(c, rank.first_arguments())
        for block, room in enumerate(rooms):
            self._watch(rank_idx, f"box of block {block}", room.box)
            self._watch(rank_idx, f"trace of block {block}", room.trace)
        for block, room in enumerate(rooms[: spec.num_processors]):
            self._watch(rank_idx, f"scratch.rows of block {block}", room.scratch.rows)
            self._watch(rank_idx, f"scratch.sums of block {block}", room.scratch.sums)
        return rank

    def _seen_by(self, rank_idx: int, segments: list[np.ndarray]) -> list[np.ndarray]:
        """Every rank's segment; of those on other hosts an image, whose control words are watched."""
        seen = list(segments)
        for peer in [peer for rank, peer in self.spec.pairs_apart if rank == rank_idx]:
            seen[peer] = np.zeros(self.layout.num_bytes, np.uint8)
            control = seen[peer][self.layout.control :].view(np.int64)
            name = f"rank {rank_idx} image of rank {peer}"
            self.images[rank_idx, peer] = self.regions[id(control)] = self.memory.region(name, control)
        return seen

    def _watch_stage(self, rank: Rank, segment: np.ndarray) -> None:
        """What a rank writes for others on other hosts, it alone, and each place once in a call."""
        for region in REGIONS:
            own, first = getattr(rank.segments, region), self.layout.stage + getattr(self.layout, region)
            staged = segment[first : first + own.nbytes].view(own.dtype)
            name, how = f"rank {rank.rank_idx} segments.staged_{region}", dict(num_writers=1, writer=rank.rank_idx)
            self.regions[id(staged)] = self.memory.region(name, staged, initialised=False, **how)

    def _watch_all(self, rank_idx: int, group: str, arrays: Mapping[str, Any], of: str = "") -> None:
        for name, array in arrays.items():
            if isinstance(array, np.ndarray) and id(array) not in self.regions:
                self._watch(rank_idx, f"{group}.{name}" + (f" of {of}" if of else ""), array)

    def _watch(self, rank_idx: int, name: str, array: np.ndarray) -> None:
        group, _, what = name.partition(".")
        rows = name in ROWS
        initialised = not rows and not any(array is other for other in self.backend.uninitialised)
        writers = self.spec.config.num_ranks if rows or (group == "segments" and what.endswith("_flag")) else 0
        full_name = f"rank {rank_idx} {name}"
        self.regions[id(array)] = self.memory.region(full_name, array, initialised=initialised, num_writers=writers)

    def _make_tokens(self) -> None:
        for epoch, (x, _) in enumerate(self.data, start=1):
            for rank_idx, part in enumerate(x):
                names = ("back.dy", "back.dx") if self.spec.forward_of(rank_idx, epoch) else ("tokens.x", "tokens.y")
                for name, array in zip(names, self.backend.expect(part), strict=True):
                    self._watch(rank_idx, f"{name} of call {epoch}", array)

    def _make_backwards(self) -> None:
        """Working memory, gradients, and what calls keep: each call is begun once, to see which arrays it has."""
        config = self.spec.config
        for rank in self.ranks:
            weights = self.weights.shard(rank.rank_idx, config.num_ranks)
            self._transposed.append(rank.packing.transpose(weights, rank.experts))
            wanted = not self.spec.frozen_experts, not self.spec.frozen_router
            self.gradients.append(zero_gradients(config, weights, self.backend, *wanted))
            for name in LARGE:  # as in memory that was used before
                getattr(self.gradients[-1], name)[:] = np.nan
            assert rank.working is not None, "its layer has a backward"
            working = rank.working._asdict() | self._transposed[-1]._asdict()
            self._watch_all(rank.rank_idx, "back", {OF_ROWS.get(name, name): each for name, each in working.items()})
            self._watch_all(rank.rank_idx, "gradients", self.gradients[-1]._asdict())
            kept: dict[int, Kept] = {}
            for call in range(1, self.spec.epochs + 1):
                _, arguments = self.begin_call(rank, call, 0, kept)
                if call in kept:
                    own = kept[call].arrays
                    for filled in ("x", "shared_factors"):
                        self.backend.note_filled(own.tokens[filled])
                    self._watch_all(rank.rank_idx, "kept", own.tokens | own.received, f"room {call}")
                if not isinstance(arguments, RankArguments):
                    self.longest = arguments
                    self.backend.note_filled(arguments.back.said)
                    self._watch_all(rank.rank_idx, "back", arguments.back._asdict(), f"call {call}")

    def begin_run(self) -> None:
        """No call is kept yet."""
        for rank in self.ranks:
            if rank.save is not None:
                rank.keeping = Keeping(rank.config, rank.save, self.backend, rank.tokens)

    def begin_call(self, rank: Rank, call: int, deadline: int, kept: dict[int, Kept]) -> tuple[Any, Arguments]:
        """(what the call returns, what its blocks are given): a forward or a backward, as the world has it.

        Args:
            kept: of the rank's calls; what this one keeps comes to it.
        """
        x, routings = self.data[call - 1]
        tokens = x[rank.rank_idx]
        forward = self.spec.forward_of(rank.rank_idx, call)
        self.backend.begin_call(rank.rank_idx, call)
        if not forward:
            begun = rank.call(tokens, routings[rank.rank_idx], call, deadline, keep=self.spec.keeps(call))
            if self.spec.keeps(call):
                kept[call] = rank.kept
            return begun
        own = self._transposed[rank.rank_idx], self.gradients[rank.rank_idx]
        assert rank.keeping is not None, "its layer has a backward"
        rank.keeping.give_back(kept[forward])  # for the next forward
        said, fresh = self.said(rank.rank_idx, call), self.spec.begins_sums(rank.rank_idx, call)
        back = BackCall(tokens, said, kept[forward], forward, rank.experts, *own, fresh)
        return rank.call_back(back, call, deadline)

    def said(self, rank_idx: int, call: int) -> np.ndarray | None:
        """Gradients of logits that a rank's backward is given."""
        routing = self.data[self.spec.forward_of(rank_idx, call) - 1][1][rank_idx]
        return self.spec.logits_gradients(call, routing, rank_idx, len(self.data[call - 1][0][rank_idx]))

    def watched(self, value: Any) -> Any:
        """Kernel arguments with regions for arrays; sizes, and weights, which nobody writes, stay as they are."""
        if isinstance(value, np.ndarray):
            return self.regions.get(id(value)) or self.memory.at(value.ctypes.data, value.size)  # a part of a room
        if isinstance(value, tuple) and not isinstance(value, Experts | Problem | Panels):
            parts = [self.watched(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        return value
