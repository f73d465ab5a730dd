"""FlashMoE: the layer as users call it."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from reference import Layout, MoEConfig, Routing, Weights, external_routing
from reference.plan import max_tasks

from .backends import check_backend, make_backend
from .errors import FlashMoEError, explain
from .heap import make_heap
from .kernel.signals import ABORT, CLOSED_FLAG, HOST, RECORD, RECORD_EPOCH, RECORD_FLAG, RECORD_ROLE
from .rank import Rank, Stats


class FlashMoE:
    """One distributed MoE layer: gate, dispatch, experts and combine as one persistent kernel per rank.

    Without `comm` all ranks live in this process and a call takes and returns the tokens of all of them. With `comm`
    each process is one rank, and a call takes and returns that rank's tokens; every rank must make the same calls.

    Args:
        config: sizes of the layer.
        weights: router and experts. With `comm` a rank may bring just its own experts (`weights.shard`). They are
            copied into the kernel's order; the layer does not keep the originals.
        comm: an mpi4py communicator of `config.num_ranks` ranks on one machine.
        backend: "cpu" (compiled) or "fibers" (interpreted, ranks of this process only).
        num_processors: blocks per rank beside the OS block; default: the cores, shared out among the ranks.
        deadline_s: a call fails when no rank has finished any task for this long.
        trace: keep a record of every task of the last call (`layer.traces`).
        backend_settings: of the fibers: seed, lanes, preempt.

    Raises:
        TypeError, ValueError: naming the argument, its value and the rule.
    """

    def __init__(
        self,
        config: MoEConfig,
        weights: Weights,
        *,
        comm: Any = None,
        backend: str = "cpu",
        num_processors: int | None = None,
        deadline_s: float = 30.0,
        trace: bool = False,
        **backend_settings: Any,
    ) -> None:
        if not isinstance(config, MoEConfig):
            raise TypeError(f"config must be a MoEConfig, got {type(config).__name__}")
        if comm is not None and not hasattr(comm, "Split_type"):
            raise TypeError(f"comm must be an mpi4py communicator or None, got {type(comm).__name__}")
        self.config = config
        self.deadline_s = deadline_s
        self._closed: str | None = None
        self._epoch = 0
        self._num_tokens: list[int] = []
        self._in_process = comm is None
        self._calling = threading.Lock()
        problem = find_problem(config, weights, comm, backend, backend_settings, num_processors, deadline_s)
        self.num_processors = num_processors or default_processors(config.num_ranks)
        self._heap = make_heap(config.num_ranks, comm)
        self._heap.agree(problem, same=repr(config))
        self._heap.allocate(Layout(config).num_bytes)
        num_blocks = len(self._heap.rank_indices) * (self.num_processors + 1)
        self._backend = make_backend(backend, num_blocks, **backend_settings)
        self._ranks = [self._make_rank(rank_idx, weights, trace) for rank_idx in self._heap.rank_indices]
        self._prepare()

    def _make_rank(self, rank_idx: int, weights: Weights, trace: bool) -> Rank:
        own = weights.shard(rank_idx, self.config.num_ranks)
        records = max_tasks(self.config) + self.config.num_experts if trace else 0
        return Rank(self.config, rank_idx, own, self._heap.segments, self.num_processors, self._backend, records)

    def _prepare(self) -> None:
        """Compile once per machine: the first rank does, the others then find it on the disk."""
        _, blocks = self._ranks[0].call(np.empty((0, self.config.hidden), self.config.numpy_dtype), None, 0, 0)
        arguments = blocks[0][1]
        if self._ranks[0].rank_idx == 0:
            self._backend.prepare(arguments)
        self._heap.barrier()
        self._backend.prepare(arguments)

    def __call__(self, x: Any, *, topk_idx: Any = None, topk_weights: Any = None) -> Any:
        """The layer's output for these tokens.

        Args:
            x: with `comm`, `[num_tokens, hidden]`; else `[num_ranks, num_tokens, hidden]`, or one array
                `[num_tokens_of_rank, hidden]` per rank. Up to `config.num_tokens` tokens per rank, 0 included.
                Element type `config.dtype`. An array that is not contiguous is copied.
            topk_idx: a routing from outside, `[..., num_topk]` for each token: distinct global expert indices.
            topk_weights: their factors, used as they are.

        Returns:
            y, shaped like x and of its type.

        Raises:
            TypeError, ValueError: before any rank starts.
            FlashMoEError: the call was given up (see the message); the layer is closed.
        """
        if self._closed:
            raise FlashMoEError(f"this layer is closed: {self._closed}")
        xs = self._per_rank("x", x)
        tokens = [self._check_tokens(part) for part in xs]
        routings = self._check_routing(tokens, topk_idx, topk_weights)
        with self._calling:
            ys = self._run(tokens, routings)
        if not self._in_process:
            return ys[0]
        return np.stack(ys) if isinstance(x, np.ndarray) else ys

    def _per_rank(self, name: str, value: Any) -> list[Any]:
        """One entry per rank of this process."""
        if not self._in_process:
            return [value]
        if not isinstance(value, (np.ndarray, list, tuple)):
            raise TypeError(f"{name} must be an array or a list of arrays, got {type(value).__name__}")
        if len(value) != self.config.num_ranks:
            raise ValueError(f"{name} must have one part per rank: num_ranks={self.config.num_ranks}, got {len(value)}")
        return list(value)

    def _check_tokens(self, x: Any) -> np.ndarray:
        c = self.config
        if not isinstance(x, np.ndarray):
            raise TypeError(f"x must be a NumPy array, got {type(x).__name__}")
        if x.ndim != 2 or x.shape[1] != c.hidden:
            raise ValueError(f"x of a rank must have shape [num_tokens, hidden={c.hidden}], got {list(x.shape)}")
        if len(x) > c.num_tokens:
            raise ValueError(f"x of a rank must have at most config.num_tokens={c.num_tokens} tokens, got {len(x)}")
        if x.dtype != c.numpy_dtype:
            raise TypeError(f"x must have config's dtype {c.dtype}, got {x.dtype}")
        return np.require(x, requirements=("C_CONTIGUOUS", "ALIGNED", "WRITEABLE"))

    def _check_routing(self, tokens: Sequence[np.ndarray], topk_idx: Any, topk_weights: Any) -> list[Routing | None]:
        if (topk_idx is None) != (topk_weights is None):
            raise ValueError("topk_idx and topk_weights must be given together")
        if topk_idx is None:
            return [None] * len(tokens)
        indices, factors = self._per_rank("topk_idx", topk_idx), self._per_rank("topk_weights", topk_weights)
        return [
            external_routing(idx, weight, self.config, len(x))
            for x, idx, weight in zip(tokens, indices, factors, strict=True)
        ]

    def _run(self, tokens: Sequence[np.ndarray], routings: Sequence[Routing | None]) -> list[np.ndarray]:
        self._epoch += 1
        self._num_tokens = [len(x) for x in tokens]
        deadline_ns = int(self.deadline_s * 1e9)
        ys, blocks = [], []
        for rank, x, routing in zip(self._ranks, tokens, routings, strict=True):
            y, rank_blocks = rank.call(x, routing, self._epoch, deadline_ns)
            ys.append(y)
            blocks += rank_blocks
        try:
            self._backend.run(blocks, self._leave)
        except BaseException as error:
            self._closed = f"its last call was interrupted by {type(error).__name__}"
            raise
        self._raise_if_given_up()
        return ys

    def _controls(self) -> list[np.ndarray]:
        """Control words of all ranks."""
        control = Layout(self.config).control
        return [segment[control:].view(np.int64) for segment in self._heap.segments]

    def _raise_if_given_up(self) -> None:
        controls = self._controls()
        for rank in self._ranks:
            message = explain(rank.rank_idx, controls, self.deadline_s)
            if message is not None:
                self._closed = message
                raise FlashMoEError(message)

    def _leave(self) -> None:
        """Tell all ranks that this process will not go on, so that they stop now and not at the deadline."""
        controls = self._controls()
        for rank in self._ranks:
            if rank.control[RECORD] == 0:
                rank.control[RECORD_ROLE], rank.control[RECORD_FLAG] = HOST, CLOSED_FLAG
                rank.control[RECORD_EPOCH] = self._epoch
                rank.control[RECORD] = 2
        for control in controls:
            if control[ABORT] == 0:
                control[ABORT] = 1 + self._ranks[0].rank_idx

    @property
    def routing(self) -> Any:
        """`Routing` of the last call: of this rank with `comm`, else a list over ranks."""
        routings = [rank.routing(n) for rank, n in zip(self._ranks, self._last_tokens(), strict=True)]
        return routings if self._in_process else routings[0]

    @property
    def stats(self) -> Stats | list[Stats]:
        """`Stats` of the last call: of this rank with `comm`, else a list over ranks."""
        stats = [rank.stats(self._epoch, n) for rank, n in zip(self._ranks, self._last_tokens(), strict=True)]
        return stats if self._in_process else stats[0]

    @property
    def traces(self) -> dict[tuple[int, int], np.ndarray]:
        """Raw records of the last call, by (rank, block); decoded by `flashmoe_numba.trace`."""
        self._last_tokens()
        return {(rank.rank_idx, block): t for rank in self._ranks for block, t in enumerate(rank.traces)}

    def _last_tokens(self) -> list[int]:
        if not self._num_tokens:
            raise ValueError("there was no call yet: routing, stats and traces tell of the last one")
        return self._num_tokens

    def close(self) -> None:
        """Give memory and threads back. With `comm`, every rank must close."""
        self._close(orderly=self._closed is None)

    def _close(self, *, orderly: bool) -> None:
        if self._heap is None:
            return
        if not orderly:
            self._leave()
        self._closed = self._closed or "close() was called"
        self._backend.close()
        self._ranks = []
        heap, self._heap = self._heap, None
        heap.close(orderly=orderly)

    def __enter__(self) -> FlashMoE:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._close(orderly=kind is None and self._closed is None)


def default_processors(num_ranks: int) -> int:
    """Cores of this process, shared out among the ranks; at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // num_ranks)


def find_problem(*arguments: Any) -> Exception | None:
    """The error that `check_arguments` raises, or None."""
    try:
        check_arguments(*arguments)
    except (TypeError, ValueError) as error:
        return error
    return None


def check_arguments(
    config: MoEConfig,
    weights: Any,
    comm: Any,
    backend: str,
    backend_settings: dict[str, Any],
    num_processors: int | None,
    deadline_s: float,
) -> None:
    """What a layer can know to be wrong before it takes memory."""
    if not isinstance(weights, Weights):
        raise TypeError(f"weights must be Weights, got {type(weights).__name__}")
    weights.check(config)
    check_backend(backend, backend_settings)
    if num_processors is not None and (isinstance(num_processors, bool) or not isinstance(num_processors, int)):
        raise TypeError(f"num_processors must be an integer, got {num_processors!r}")
    if num_processors is not None and num_processors < 1:
        raise ValueError(f"num_processors must be at least 1, got {num_processors}")
    if isinstance(deadline_s, bool) or not isinstance(deadline_s, (int, float)):
        raise TypeError(f"deadline_s must be a number, got {deadline_s!r}")
    if not 0 < deadline_s <= 86400:
        raise ValueError(f"deadline_s must be in (0, 86400], got {deadline_s}")
    if comm is not None and backend == "fibers":
        raise ValueError("backend 'fibers' runs all ranks in this process: leave comm out")
    if comm is not None and comm.size != config.num_ranks:
        raise ValueError(f"comm must have config.num_ranks={config.num_ranks} ranks, got {comm.size}")
    for rank_idx in range(config.num_ranks) if comm is None else [comm.rank]:
        weights.shard(rank_idx, config.num_ranks)  # raises if its experts are not there
