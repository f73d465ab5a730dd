"""FlashMoE: the layer as users call it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reference import Layout, MoEConfig, Weights
from reference.cache_folder import usable_cache_folder
from reference.plan import max_tasks
from reference.runs import PACKINGS

from ..backends import make_backend
from ..backends.protocols import Backend
from ..errors import FlashMoEError
from ..heap import make_heap
from ..heap.protocols import Heap
from ..heap.rank import Rank, Stats
from ..heap.tensors import as_array, like_given
from ..kernel.control import ABORT, CLOSED_BY_THREAD, CLOSED_EARLY, FAILED
from ..kernel.signals import EPOCH_SHIFT
from ..kernel.state import Experts
from ..processes.meeting import SETUP_DEADLINE_S
from ..processes.ownership import Owned
from .arguments import DEADLINE_S, LayerSettings, communicator
from .failures import explain
from .given import Given, check_given, check_what_is_given
from .packed import PackedWeights

LAST_EPOCH = 2**31 - 1


class FlashMoE(Owned):
    """One distributed MoE layer: gate, dispatch, experts and combine as one persistent kernel per rank.

    Without `comm` all ranks live in this process and a call takes and returns the tokens of all of them. With `comm`
    each process is one rank, and a call takes and returns that rank's tokens; every rank must make the same calls.
    A layer belongs to the process that made it: it cannot be copied or pickled, and not be called in a forked child.

    Numbers have the ranges of their types: logits that of the accumulator (float32, or float64 for float64), beyond
    which a token has NaN weights and goes to experts 0 to k - 1; hidden rows and experts' results that of the element
    type, to which they are rounded before a weight is applied (float16: infinite from 65,520 on). So a bad token spoils
    its own row only, a weight of 0 adds nothing in any case, and `stats` counts what is not finite.

    Args:
        config: sizes of the layer.
        weights: router and experts. With `comm` a rank may bring just its own experts (`weights.shard`). They are
            copied into the kernel's order; the layer does not keep the originals.
        comm: an mpi4py communicator of `config.num_ranks` ranks on one machine.
        process_group: in its place, such a group of torch.distributed, of any backend that has a store. What is said of
            `comm` holds for it. (`torch.distributed.group.WORLD` is None before `init_process_group`.)
        backend: "cpu" or "cuda" (compiled), or "fibers" (interpreted, ranks of this process only).
        num_processors: blocks per rank beside the OS block; default: the cores, or the blocks that a GPU holds at a
            time, shared out among the ranks.
        deadline_s: a call fails when no rank has finished any task for this long.
        setup_deadline_s: with `comm`, how long a rank waits for the others while they make their layers.
        trace: keep a record of every task of the last call (`layer.traces`).
        packing: "sources": a row tile holds rows of any source, so that few rows of many ranks share an expert's
            weights; "none": every source's rows have tiles of their own. Results are the same, bit for bit.
        backend_settings: of the fibers: seed, lanes, preempt. Of cuda: device (index of the GPU; default: the current
            one, and with `comm` the rank's number modulo the GPUs), tf32 (multiply float32 as TF32). Of cpu: arithmetic
            (how bfloat16 is multiplied: "fma", "pairs" or "tiles", each of which has the same bits on all CPUs, see
            tile_gemm/arithmetic.py; default: "auto", the fastest that this one has an instruction for).

    Raises:
        TypeError, ValueError: naming the argument, its value and the rule.
        TimeoutError: not all ranks of `comm` came within `setup_deadline_s`.
    """

    def __init__(
        self,
        config: MoEConfig,
        weights: Weights,
        *,
        comm: Any = None,
        process_group: Any = None,
        backend: str = "cpu",
        num_processors: int | None = None,
        deadline_s: float = DEADLINE_S,
        setup_deadline_s: float = SETUP_DEADLINE_S,
        trace: bool = False,
        packing: str = PACKINGS[0],
        **backend_settings: Any,
    ) -> None:
        comm = communicator(comm, process_group)
        settings = LayerSettings(
            config=config,
            weights=weights,
            comm=comm,
            backend=backend,
            backend_settings=backend_settings,
            num_processors=num_processors,
            deadline_s=deadline_s,
            setup_deadline_s=setup_deadline_s,
            trace=trace,
            packing=packing,
        )
        if comm is None:
            settings.check()
        heap = make_heap(config, comm, backend, settings.patience_s())
        made: list[Backend] = []
        first_rank, how = heap.rank_indices[0], settings.backend_settings
        self._set_up(settings, heap, made, lambda: made.append(make_backend(backend, config, first_rank, **how)))

    @classmethod
    def from_parts(
        cls,
        config: MoEConfig,
        weights: Weights,
        heap: Heap,
        backend: Backend,
        *,
        num_processors: int | None = None,
        deadline_s: float = DEADLINE_S,
        trace: bool = False,
        packing: str = PACKINGS[0],
    ) -> FlashMoE:
        """A layer on objects (backends/protocols.py, heap/protocols.py) in place of names.

        It closes them when it is closed, or where it cannot be made.

        Args:
            weights: of the experts of all ranks.
            heap: without segments yet.

        Raises:
            TypeError, ValueError: naming the argument, its value and the rule.
        """
        for name, part, verb in (("heap", heap, "allocate"), ("backend", backend, "run")):
            if not hasattr(part, verb):
                raise TypeError(f"{name} must be an object with the methods of its protocol, got {part!r}")
        how: dict[str, Any] = dict(num_processors=num_processors, deadline_s=deadline_s, trace=trace, packing=packing)
        layer = cls.__new__(cls)
        layer._set_up(LayerSettings(config=config, weights=weights, **how), heap, [backend], lambda: None)
        return layer

    def _set_up(
        self, settings: LayerSettings, heap: Heap, made: list[Backend], make_backend: Callable[[], None]
    ) -> None:
        """All steps of setting up; `made` holds the backend, at the latest when `make_backend` was called."""
        try:
            heap.together(lambda: settings.check(heap))  # the other ranks must hear of a problem, too
            heap.agree(None, same=settings.shared())
            heap.together(make_backend)
            self._backend = made[0]
            self._make_ready(settings, heap)
        except BaseException:
            with contextlib.suppress(Exception):  # what failed may fail again, and must not hide it
                for backend in made:
                    backend.close()
            with contextlib.suppress(Exception):
                heap.close(None)
            raise

    def _make_ready(self, settings: LayerSettings, heap: Heap) -> None:
        """All steps of setting up that take memory or compile, each with all ranks."""
        self.config, self.deadline_s = settings.config, settings.deadline_s
        self._closed: str | None = None
        self._epoch = 0
        self._num_tokens: list[int] = []
        self._calling = threading.Lock()
        self._caller = 0
        self._ranks: list[Rank] = []
        self._heap: Heap | None = heap
        self._in_process = heap.all_here
        folder = Path(heap.from_first(lambda: str(usable_cache_folder())))
        _one_first(heap, lambda: self._backend.load(folder))
        heap.together(lambda: self._set_processors(settings.num_processors, heap))
        heap.allocate(Layout(self.config).num_bytes, self._backend)
        heap.together(lambda: self._make_ranks(settings, heap))
        of_ranks = [rank.first_arguments() for rank in self._ranks]
        _one_first(heap, lambda: self._backend.prepare(self.config, of_ranks, folder))

    def _set_processors(self, wanted: int | None, heap: Heap) -> None:
        here = len(heap.rank_indices)
        self.num_processors = wanted or self._backend.default_processors(here, self.config.num_ranks)
        self._backend.check_grid(here, self.num_processors)

    def _make_ranks(self, settings: LayerSettings, heap: Heap) -> None:
        config = self.config
        events = max_tasks(config) + config.num_experts if settings.trace else 0
        for rank_idx in heap.rank_indices:
            own = settings.weights.shard(rank_idx, config.num_ranks)
            memory = heap.segments, self.num_processors, self._backend
            self._ranks.append(Rank(config, rank_idx, own, *memory, events, settings.packing == "sources"))
        self.packed = PackedWeights(config, self._ranks, [rank.experts for rank in self._ranks])

    def pack(self, weights: Weights) -> PackedWeights:
        """Other weights for this layer's calls: so the layers of a model share threads, segments and scratch.

        They are copied into the kernel's order, and kept for as long as the result is. Each rank packs for itself.

        Raises:
            TypeError, ValueError: naming the array, what it is and what the config asks for.
        """
        self._raise_if_closed()
        return PackedWeights.pack(self.config, self._ranks, weights)

    def load(self, weights: Weights, into: PackedWeights | None = None) -> None:
        """Repack weights that have changed, in the memory that the old ones had; calls of other threads wait.

        Args:
            into: what `pack` returned; None: the weights that this layer was made with.

        Raises:
            TypeError, ValueError: naming the array, what it is and what the config asks for.
        """
        with self._calling:
            self._raise_if_closed()
            self._own("into", into)
            self._backend.synchronize()
            (into or self.packed).load(weights)
            self._backend.synchronize()

    def _own(self, name: str, packed: PackedWeights | None) -> Sequence[Experts]:
        """What `packed` gives to each rank here, or the weights that this layer was made with."""
        packed = self.packed if packed is None else packed
        found = packed.fits(self._ranks) if isinstance(packed, PackedWeights) else None
        if found is None:
            hint = ": layer.pack(weights)?" if isinstance(packed, Weights) else ""
            raise ValueError(f"{name} must be what pack() of this layer returned, got {type(packed).__name__}{hint}")
        return found

    def __call__(
        self,
        x: Any,
        *,
        topk_idx: Any = None,
        topk_weights: Any = None,
        logits: Any = None,
        weights: PackedWeights | None = None,
    ) -> Any:
        """The layer's output for these tokens.

        Args:
            x: with `comm`, `[num_tokens, hidden]`; else `[num_ranks, num_tokens, hidden]`, or one array
                `[num_tokens_of_rank, hidden]` per rank. Up to `config.num_tokens` tokens per rank, 0 included.
                Element type `config.dtype`. An array that is not contiguous is copied. With backend "cuda" arrays on
                the GPU: CuPy's, PyTorch's, Numba's; bfloat16 may come as int16 bit patterns. With the others
                PyTorch's tensors are read where they are, and y is a tensor.
            topk_idx: a routing from outside, `[..., num_topk]` for each token: distinct global expert indices, of
                zero-computation experts from `config.num_experts` on. -1 and `config.num_choices` are no choice, as
                often as you like: nothing is sent or added; `routing` has -1.
            topk_weights: their factors, used as they are; those of no choice are not looked at. A router with choice
                "given" makes them itself where topk_idx comes alone.
            logits: `[..., num_choices]` for each token, floating, in place of the router's products, which a bias is
                yet to be added to: for models whose router is no matrix, or has another input. On GPUs, too, they and
                a routing are NumPy's.
            weights: others than those that this layer was made with: what `pack` returned.

        Returns:
            y, shaped like x and of its type. With backend "cuda" it is filled in the order of the caller's stream, and
            whether the call was given up is known after it: from a later call, or from `synchronize`. So it is with
            replays of a call that was captured in a CUDA graph.

        Raises:
            TypeError, ValueError: before any rank starts.
            FlashMoEError: the call was given up (see the message); the layer is closed.
        """
        self._raise_if_closed()
        parts = self._per_rank("x", x)
        names = [f"x[{i}]" for i in range(len(parts))] if self._in_process else ["x"]
        check = self._backend.check_tokens
        tokens = [check(name, part, self.config) for name, part in zip(names, parts, strict=True)]
        given = self._check_given(tokens, topk_idx=topk_idx, topk_weights=topk_weights, logits=logits)
        with self._calling:
            self._caller = threading.get_ident()
            ys = self._run(tokens, given, weights)
        y = self._backend.join(x, ys) if self._in_process else ys[0]
        return like_given(x, y)

    def _per_rank(self, name: str, value: Any) -> list[Any]:
        """One entry per rank of this process."""
        if not self._in_process:
            return [value]
        if not (isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) > 0):
            raise TypeError(f"{name} must be an array or a list of arrays, got {type(value).__name__}")
        if isinstance(value, np.ndarray) and value.dtype.kind == "O":
            raise TypeError(f"{name} must be a list if parts differ in length, got an array of objects: list({name})?")
        num_ranks = self.config.num_ranks
        if getattr(value, "ndim", None) == 2:
            hint = f": {name}[None]?" if num_ranks == 1 else ""
            rule = f"one part per rank: num_ranks={num_ranks} arrays with a row per token"
            raise ValueError(f"{name} must have {rule}, got one array of shape {list(value.shape)}{hint}")
        if len(value) != num_ranks:
            raise ValueError(f"{name} must have one part per rank: num_ranks={num_ranks}, got {len(value)}")
        return [value[rank_idx] for rank_idx in range(len(value))]  # Numba's device arrays have no iterator

    def _check_given(self, tokens: Sequence[Any], **arguments: Any) -> list[Given]:
        """What each rank gets beside its tokens; errors of several ranks' arguments name the rank."""
        check_what_is_given(self.config, **arguments)
        none = [None] * len(tokens)
        parts = {name: none if value is None else self._per_rank(name, value) for name, value in arguments.items()}
        given = []
        for i, (rank, x) in enumerate(zip(self._ranks, tokens, strict=True)):
            try:
                arrays = {name: as_array(name, part[i]) for name, part in parts.items()}
                given.append(check_given(self.config, len(x), **arrays))
            except (TypeError, ValueError) as error:
                raise type(error)(f"rank {rank.rank_idx}: {error}") from None
        return given

    def _run(
        self, tokens: Sequence[np.ndarray], given: Sequence[Given], weights: PackedWeights | None
    ) -> list[np.ndarray]:
        self._raise_if_closed()
        experts = self._own("weights", weights)
        self._backend.begin(tokens)
        self._raise_if_known()
        if self._epoch == LAST_EPOCH:
            raise FlashMoEError(f"a layer makes at most {LAST_EPOCH} calls, because flags count them: make a new one")
        self._epoch += 1
        self._num_tokens = [len(x) for x in tokens]
        deadline_ns = self._backend.deadline_ns(self.deadline_s)
        ys, of_ranks = [], []
        try:
            for rank, x, (routing, topk_idx, logits), own in zip(self._ranks, tokens, given, experts, strict=True):
                y, of_rank = rank.call(x, routing, self._epoch, deadline_ns, topk_idx, logits, own)
                ys.append(y)
                of_ranks.append(of_rank)
            self._backend.run(of_ranks, self._leave)
        except BaseException as error:
            self._closed = f"its last call was interrupted by {type(error).__name__}"
            self._leave()
            raise
        self._raise_if_known()
        return ys

    def _raise_if_known(self) -> None:
        """A GPU may be at the call still: then a later one, or `synchronize`, tells what became of it."""
        if self._backend.may_have_failed():
            self._raise_if_given_up()

    def synchronize(self) -> None:
        """Wait for the last call; only on a GPU do calls return before they are done.

        Raises:
            FlashMoEError: the call was given up; the layer is closed.
        """
        self._raise_if_closed()
        self._backend.synchronize()
        self._raise_if_given_up()

    @property
    def closed(self) -> bool:
        """Does it take no more calls, because of `close()` or because one was given up or interrupted?"""
        return bool(self._closed)

    def _raise_if_closed(self) -> None:
        self.require_maker()
        if self._closed:
            raise FlashMoEError(f"this layer is closed: {self._closed}")

    def _controls(self) -> list[np.ndarray]:
        """Control words of all ranks."""
        assert self._heap is not None, "ranks go with it"
        control = Layout(self.config).control
        return [self._backend.to_host(segment[control:]).view(np.int64) for segment in self._heap.segments]

    def _raise_if_given_up(self) -> None:
        for rank in self._ranks:
            if self._backend.to_host(rank.control)[ABORT] != 0:  # then the record that it points to is complete
                self._closed = explain(rank.rank_idx, self._controls())
                raise FlashMoEError(self._closed)

    def _leave(self, why: int = FAILED) -> None:
        """Tell all ranks that this process will not go on, so that they stop now and not at the deadline.

        Raises nothing: it is called when something else went wrong, which may have taken the GPU with it.
        """
        for rank in self._ranks:
            with contextlib.suppress(Exception):
                self._backend.leave(*rank.leaving(self._epoch), why)

    @property
    def routing(self) -> Any:
        """`Routing` of the last call: of this rank with `comm`, else a list over ranks."""
        routings = [rank.routing(n) for rank, n in zip(self._ranks, self._last_tokens(), strict=True)]
        return routings if self._in_process else routings[0]

    @property
    def stats(self) -> Stats | list[Stats]:
        """`Stats` of the last call: of this rank with `comm`, else a list over ranks."""
        stats = [
            r.stats(epoch, n) for r, epoch, n in zip(self._ranks, self._epochs(), self._last_tokens(), strict=True)
        ]
        return stats if self._in_process else stats[0]

    @property
    def row_tiles(self) -> Any:
        """`RowTile`s of the last call, for each expert of this rank with `comm`, else a list over ranks of these.

        Which rows share a tile depends on what came when, unless each source's rows have tiles of their own.
        """
        self._last_tokens()
        tiles = [rank.row_tiles(epoch) for rank, epoch in zip(self._ranks, self._epochs(), strict=True)]
        return tiles if self._in_process else tiles[0]

    def _epochs(self) -> list[int]:
        """The last call of each rank here."""
        return [self._backend.epoch(position, self._epoch) for position in range(len(self._ranks))]

    @property
    def traces(self) -> dict[tuple[int, int], np.ndarray]:
        """Raw events of the last call, by (rank, block); decoded by `flashmoe_numba.seeing.trace`."""
        self._last_tokens()
        return {
            (rank.rank_idx, block): trace
            for rank in self._ranks
            for block, trace in enumerate(np.split(self._backend.to_host(rank.traces), self.num_processors + 1))
        }

    def _last_tokens(self) -> list[int]:
        self._raise_if_closed()
        if not self._num_tokens:
            raise ValueError("there was no call yet: routing, stats, row_tiles and traces tell of the last one")
        return self._num_tokens

    def close(self) -> None:
        """Give memory and threads back. With `comm`, every rank must close, and waits for the others.

        In a process that was forked from the one that made the layer it does nothing: all is the parent's.

        Raises:
            FlashMoEError: another rank left because of an error, or makes a call more.
        """
        self._close(orderly=True)

    def _close(self, *, orderly: bool) -> None:
        if self.inherited:
            return
        if not self._calling.acquire(blocking=False):
            if self._caller == threading.get_ident():
                raise FlashMoEError("close() was called inside a call of this layer, say by a signal handler")
            if self._ranks:
                self._leave(CLOSED_BY_THREAD)  # a call in another thread: end it, then go on
            self._calling.acquire()
        with contextlib.ExitStack() as stack:
            stack.callback(self._calling.release)
            if self._heap is None:
                return
            try:
                if orderly and not self._closed:
                    self._give_back(self._heap)
                else:
                    self._abandon(self._heap)
            finally:
                self._closed = self._closed or "close() was called"
                self._ranks, self._heap = [], None
                del self.packed

    def _give_back(self, heap: Heap) -> None:
        """Close backend and heap, with all ranks."""
        try:
            self._backend.synchronize()
            self._epoch = self._backend.epoch(0, self._epoch)
            self._backend.close()
        except BaseException:
            self._abandon(heap)
            raise
        heap.close(self._look_at_others)

    def _look_at_others(self) -> None:
        """While this rank waits for the others to close: raise if one has left, or makes a call that this one will not.

        Raises:
            FlashMoEError: as all ranks do then.
        """
        signals = [self._backend.to_host(rank.segments.dispatch_flag) for rank in self._ranks]
        if any((words >> EPOCH_SHIFT > self._epoch).any() for words in signals):
            self._leave(CLOSED_EARLY)
        self._raise_if_given_up()

    def _abandon(self, heap: Heap) -> None:
        """The same after an error, which was told already: tell the others, wait for nobody, and raise nothing more."""
        self._leave()
        with contextlib.suppress(Exception):
            self._backend.close()
        heap.close(None)

    def __enter__(self) -> FlashMoE:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._close(orderly=kind is None)


def _one_first(heap: Heap, step: Callable[[], None]) -> None:
    """Take a step that may compile: one rank of a machine does, the others then find its kernel on the disk."""
    first = heap.rank_indices[0] == 0
    heap.together(lambda: step() if first else None)
    heap.together(lambda: None if first else step())
