"""What a layer stands on: memory for a rank's arrays, and a heap of segments.

Arrays are NumPy's, or on a GPU CuPy's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from reference import Hosts, Layout, MoEConfig
from reference.arrays import Array

T = TypeVar("T")


class Memory(Protocol):
    """Where a rank's arrays lie, and those that its user brings.

    Attributes:
        grows: does an array take room only as it is written?
    """

    grows: bool

    def zeros(self, size: int, dtype: npt.DTypeLike) -> Array:
        """`[size]`, each 0.

        Raises:
            MemoryError: how much is needed and how much is free, where that is known.
        """

    def empty(self, size: int, dtype: npt.DTypeLike) -> Array:
        """`[size]`, with whatever was there."""

    def lend(self, array: Array, give_back: Callable[[Array], None]) -> Array:
        """The same memory as an array of its own, and `give_back(array)` once nobody has that one or a view of it.

        On a GPU just the array: what nobody has is taken by the next who asks for memory.
        """

    def array(self, values: Array) -> Array:
        """Values from the host in an array of this memory: the same array, where the host's is that."""

    def make_wire(self, num_words: int, own: Array, layout: Layout, rank_idx: int) -> Array:
        """What a rank's kernel has to do puts: an empty ring of so many words, or what it must know to do them itself.

        Args:
            num_words: 0, if all ranks are on one host.
            own: the rank's segment.
        """

    def address(self, array: Array) -> int:
        """Where the array begins, as the kernel sees it."""

    def to_host(self, array: Array) -> Array:
        """A copy for the host to read, when all work on the array so far is done."""

    def store(self, target: Array, values: Array) -> None:
        """Copy values from the host into an array of this memory, as a part of the call that began."""

    def copy(self, target: Array, source: Array) -> None:
        """Copy an array of this memory into another, as a part of the call that began."""

    def pack(
        self,
        matrices: Sequence[Array],
        biases: Sequence[Array | None],
        tile_n: int,
        accumulator: np.dtype[Any],
        rows: Array | None,
        into: Any = None,
    ) -> Any:
        """Weights in the form that the tile GEMM of this memory's kernel reads.

        Args:
            matrices: one, or two of a gated product, `[experts, columns, depth]` each.
            biases: of each of them, `[experts, columns]` or None.
            tile_n: columns of a tile.
            rows: what they will multiply, where that lies in one place in all calls; not looked at where a kernel is
                not told in advance.
            into: what this returned for other weights of these shapes and these rows, to be filled anew.
        """

    def unpack(self, packed: Any, out: Sequence[Array]) -> None:
        """The matrices that `pack` was given, without their biases.

        Args:
            packed: what `pack` returned.
            out: host arrays like `matrices`, of any strides, to be filled.
        """

    def aim(self, matrices: Any, rows: Array) -> None:
        """In the call that began, these weights, which `pack` returned, multiply rows that lie here."""

    def beside(self, matrices: Any) -> Any:
        """The same weights, where they are, for other rows: `aim` says which, in each call."""

    def no_tokens(self, config: MoEConfig) -> Any:
        """What `check_tokens` returns of a rank that has none."""

    def check_tokens(self, name: str, x: Any, config: MoEConfig) -> Any:
        """One rank's tokens, as `adopt` wants them. Errors call them `name`.

        Raises:
            TypeError, ValueError: naming the rule, and both sides of it.
        """

    def adopt(self, x: Any) -> tuple[Array, Array, Any]:
        """(tokens as the kernel sees them, room for results likewise, the same room as the user sees it)."""

    def join(self, x: Any, parts: list[Any]) -> Any:
        """Results of all ranks in the form in which the tokens came: one array, or the list as it is."""


class Heap(Protocol):
    """Symmetric memory: one segment per rank, all of one size, all visible to every rank.

    Attributes:
        num_ranks: of the layer.
        rank_indices: those that live in this process.
        hosts: which ranks share one: known before `allocate`.
        first_here: the lowest rank of this host.
        all_here: a call takes and returns the tokens of all ranks, and not those of this process's one.
        segments: rank -> bytes, of all ranks; empty before `allocate` and after `close`.
    """

    num_ranks: int
    rank_indices: range
    hosts: Hosts
    all_here: bool
    segments: list[Array]

    @property
    def first_here(self) -> int: ...

    def agree(self, error: Exception | None, same: Mapping[str, Any] | None = None) -> None:
        """Raise on every rank if any brings an error, or if values by name are not the `same` on all ranks.

        Where all ranks are here: raise the error, if there is one.
        """

    def together(self, step: Callable[[], T]) -> T:
        """What this rank's step returns; if it fails on any rank, raise on all as `agree` does.

        Where all ranks are here: just take it.
        """

    def from_first(self, make: Callable[[], str]) -> str:
        """The text of this host's first rank on all of its ranks; only there it is made. If that fails anywhere, raise
        on all as `agree` does.
        """

    def allocate(self, num_bytes: int, memory: Memory) -> None:
        """Take zeroed segments of `num_bytes` each: in `memory`, or in what processes can share.

        Raises:
            MemoryError, ValueError: on every rank, naming what is missing.
        """

    def segments_of(self, rank_idx: int) -> list[Array]:
        """Every rank's segment as a rank of this process reaches it: of one on another host, an image.

        Of images only control words are kept fresh, by whoever carries puts between hosts.
        """

    def carry(self, control_at: int, wires: Sequence[Array], most_bytes: int) -> None:
        """Be ready to bring puts to other hosts; nothing, where all ranks share one.

        Args:
            control_at: where the control words begin in a segment, in bytes.
            wires: of each rank of this process, the ring into which it posts puts (kernel/wire.py).
            most_bytes: of rows that a rank puts to one other in a call.
        """

    def carrying(self, deadline_s: float) -> AbstractContextManager[None]:
        """While this lasts puts come and go. Its end takes all that were posted in it, however it ends.

        Raises:
            FlashMoEError: they could not be taken.
        """

    def close(self, check: Callable[[], None] | None) -> None:
        """Give everything back, which takes all ranks, or with `check=None` leave it to the end of the process.

        Args:
            check: called while waiting for the others; raises if one of them will not come.
        """
