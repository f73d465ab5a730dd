"""FlashMoE: the layer as users call it."""

from __future__ import annotations

from typing import Any

from reference import MoEConfig, Weights
from reference.runs import PACKINGS

from ..backends.protocols import Backend
from ..heap import make_heap
from ..heap.protocols import Heap
from ..heap.rank import Rank
from ..heap.tensors import like_given
from ..processes.meeting import SETUP_DEADLINE_S
from .arguments import DEADLINE_S, LayerSettings, check_flags, communicator
from .backward import Backward, check_gradients
from .calls import Calls
from .forward import Forward, check_beside, check_tokens
from .gradients import Gradients, call_sums, make_gradients, no_gradients
from .last_call import LastCall
from .life import Life
from .packed import PackedWeights
from .parts import set_up
from .saved import SavedCall


class FlashMoE(LastCall):
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
        comm: an mpi4py communicator of `config.num_ranks` ranks, on one machine or on several (docs/clusters.md).
        process_group: in its place, such a group of torch.distributed, of any backend that has a store. What is said of
            `comm` holds for it, but all ranks must be on one machine. (`torch.distributed.group.WORLD` is None before
            `init_process_group`.)
        backend: "cpu" or "cuda" (compiled), or "fibers" (interpreted, ranks of this process only).
        num_processors: blocks per rank beside the OS block; default: the cores, or the blocks that a GPU holds at a
            time, shared out among the ranks.
        deadline_s: a call fails when no rank has finished any task, or got any rows from another host, for this long.
        setup_deadline_s: with `comm`, how long a rank waits for the others while they make their layers.
        trace: keep a record of every task of the last call (`layer.traces`).
        save: what `forward` keeps for `backward`. "rows+up": the rows that experts got, and their products with the up
            matrices; "rows": the rows, and the products are made again; "nothing": no rows, they are sent again. None:
            there is no backward. With a backward there are two copies of the matrices, one of them transposed.
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
        save: str | None = None,
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
            save=save,
        )
        if comm is None:
            settings.check()
        self._begin(settings, make_heap(config, comm, backend, settings.patience_s()))

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
        save: str | None = None,
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
        how: dict[str, Any] = dict(
            num_processors=num_processors, deadline_s=deadline_s, trace=trace, packing=packing, save=save
        )
        layer = cls.__new__(cls)
        layer._begin(LayerSettings(config=config, weights=weights, **how), heap, backend)
        return layer

    def _begin(self, settings: LayerSettings, heap: Heap, backend: Backend | None = None) -> None:
        self._parts = parts = set_up(settings, heap, backend)
        self.config, self.num_processors, self.deadline_s = parts.config, parts.num_processors, settings.deadline_s
        self._life = Life(parts)
        self._calls = Calls(parts, self._life)

    @property
    def _backend(self) -> Backend:
        return self._parts.backend

    @property
    def _ranks(self) -> list[Rank]:
        return self._parts.ranks

    @property
    def packed(self) -> PackedWeights:
        """The weights that this layer was made with."""
        self._require_open()
        assert self._parts.packed is not None, "it goes when the layer is closed"
        return self._parts.packed

    def pack(self, weights: Weights) -> PackedWeights:
        """Other weights for this layer's calls: so the layers of a model share threads, segments and scratch.

        They are copied into the kernel's order, and kept for as long as the result is. Each rank packs for itself.

        Raises:
            TypeError, ValueError: naming the array, what it is and what the config asks for.
        """
        self._require_open()
        packed = PackedWeights(self.config, self._ranks, weights)
        with self._calls.turn():  # another thread may have closed the layer meanwhile
            self._parts.held.add(packed)
        return packed

    def load(self, weights: Weights, into: PackedWeights | None = None) -> None:
        """Repack weights that have changed, in the memory that the old ones had; calls of other threads wait.

        Args:
            into: what `pack` returned; None: the weights that this layer was made with.

        Raises:
            TypeError, ValueError: naming the array, what it is and what the config asks for.
        """
        self._require_open()
        with self._calls.turn():
            packed = self._parts.own("into", into)
            self._backend.synchronize()
            packed.load(weights)
            self._backend.synchronize()

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
            TypeError, ValueError: before any rank starts. With `comm` the others wait for this rank, which may make the
                call with other arguments; at the latest they give up at their deadline, and if it leaves the layer's
                `with`, closes the layer, or ends, at once.
            FlashMoEError: the call was given up (see the message); the layer is closed.
        """
        y, _ = self._forward(x, weights, False, topk_idx=topk_idx, topk_weights=topk_weights, logits=logits)
        return y

    def _forward(
        self, x: Any, weights: PackedWeights | None, keep: bool, **beside: Any
    ) -> tuple[Any, SavedCall | None]:
        self._require_open()
        tokens = check_tokens(self._parts, x)
        if keep:
            self._backend.check_keeping(tokens)
        given = check_beside(self._parts, tokens, **beside)
        with self._calls.turn():
            packed = self._parts.own("weights", weights)
            ys = self._calls.run(Forward(tokens, given, packed.of_ranks, keep), self.deadline_s)
            saved = self._saved(packed) if keep else None
        return like_given(x, self._backend.join(x, ys) if self._parts.all_here else ys[0]), saved

    def _saved(self, packed: PackedWeights) -> SavedCall:
        """What the call that was just made has kept."""
        saved = SavedCall(self._ranks, packed, self._life.epoch)
        self._parts.held.add(saved)
        return saved

    def forward(
        self,
        x: Any,
        *,
        topk_idx: Any = None,
        topk_weights: Any = None,
        logits: Any = None,
        weights: PackedWeights | None = None,
    ) -> tuple[Any, SavedCall]:
        """(y, what is kept for the backward): the same call, of a layer with `save`, whose y has the same bits.

        Several calls may wait for their backwards, which come in any order, the same on all ranks.

        Args, Raises: as `__call__` has them.
        """
        self._require_backward()
        y, saved = self._forward(x, weights, True, topk_idx=topk_idx, topk_weights=topk_weights, logits=logits)
        assert saved is not None
        return y, saved

    def backward(
        self,
        saved: SavedCall,
        dy: Any,
        *,
        logits_gradient: Any = None,
        into: Gradients | None = None,
        experts: bool = True,
        router: bool = True,
        retain: bool = False,
    ) -> Gradients:
        """The gradients of a loss whose gradient by y is `dy`; `saved` is used up, unless `retain`.

        They have the same bits for any number of processors, any packing and in every run. On other numbers of ranks,
        too, where the tokens of all ranks follow each other in the same order and none are dropped, but for those of
        router, shared expert and the scale of a norm of results, which each rank makes of its own tokens: add them up
        in the order of ranks.

        Args:
            saved: what `forward` returned with y.
            dy: like y.
            logits_gradient: `[..., num_choices]` for each token: added to the gradient of the logits as the product
                with the router makes them, for losses that read these.
            into: gradients of an earlier backward, whose sums for weights this one goes on with, call after call.
            experts: are the gradients of the experts' weights wanted, the shared one's and their norm's scale among
                them? Without, they are frozen, and no task is made for them.
            router: likewise those of the router, its biases and scales.
            retain: may `saved` have another backward?

        Raises:
            TypeError, ValueError: before any rank starts, as `__call__` has it; `saved` can still be used.
            FlashMoEError: the call was given up, say because another rank made another call; the layer is closed.
        """
        self._require_backward()
        if not isinstance(saved, SavedCall):
            raise TypeError(f"saved must be what forward() returned with y, got {type(saved).__name__}")
        check_flags(experts=experts, router=router, retain=retain)
        parts = self._parts
        with self._calls.turn():  # all of it: others may use `saved`, load weights, or want the memory of what is found
            kept, packed = saved.peek(parts.ranks), saved.packed
            tokens, said = check_gradients(parts, kept, dy, logits_gradient)
            parts.backend.check_keeping(tokens)
            sums = call_sums(parts, packed, into, experts, router)
            try:
                call = Backward(tokens, said, kept, saved.epoch, packed, sums.arrays, sums.fresh)
                found = self._calls.run(call, self.deadline_s)
            finally:
                if not retain:
                    saved.close()
            sums.settle(parts, packed)
            return make_gradients(parts, dy, packed, sums.arrays, found)

    def no_gradients(
        self, weights: PackedWeights | None = None, *, experts: bool = True, router: bool = True
    ) -> Gradients:
        """Zeros to go on from: for `backward(..., into=)`, whose sums may begin with what is written into `weights`.

        Args:
            weights: what they are gradients of, as `forward` has it.
            experts, router: as `backward` has them.
        """
        self._require_backward()
        check_flags(experts=experts, router=router)
        return no_gradients(self._parts, self._parts.own("weights", weights), experts, router)

    def _require_backward(self) -> None:
        self._require_open()
        if self._parts.ranks[0].save is None:
            rule = "save must be given where a layer is made, for calls to have a backward"
            raise ValueError(f"{rule}: FlashMoE(save=...)")

    def synchronize(self) -> None:
        """Wait for the last call; only on a GPU do calls return before they are done.

        Raises:
            FlashMoEError: the call was given up; the layer is closed.
        """
        self._require_open()
        self._backend.synchronize()
        self._life.raise_if_given_up()

    @property
    def closed(self) -> bool:
        """Does it take no more calls, because of `close()` or because one was given up or interrupted?"""
        return bool(self._life.closed)

    def _require_open(self) -> None:
        self.require_maker()
        self._life.require_open()

    def close(self) -> None:
        """Give memory and threads back. With `comm`, every rank must close, and waits for the others.

        What users still have of it holds less then: calls that `forward` kept are closed, and packed weights have what
        `unpack` needs.

        In a process that was forked from the one that made the layer it does nothing: all is the parent's.

        Raises:
            FlashMoEError: another rank left because of an error, or makes a call more.
        """
        self._close(orderly=True)

    def _close(self, *, orderly: bool) -> None:
        if not self.inherited:
            self._calls.close(orderly=orderly)

    def __enter__(self) -> FlashMoE:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._close(orderly=kind is None)
