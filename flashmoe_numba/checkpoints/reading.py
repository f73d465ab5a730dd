"""The arrays of `Weights` from the tensors that hold them.

All that headers can tell is checked before the first byte of a tensor is read, so that what is wrong is known at once.
Then expert by expert: a piece is read, made numbers, put in order and rounded into its place. So beside the weights
there is never more than one expert's tensor in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from reference.arrays import Array
from reference.formats import element_dtype

from .entries import OF_EXPERTS, Entry, Sizes
from .stored import Source, Stored, check_shape, stored


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Reads the arrays of one layer, of some of its experts.

    Args:
        prefix: of all tensors' names.
        sizes: lengths of the axes by their names in entries.
        experts: that are wanted.
        block: rows and columns of a block of 8-bit weights.
    """

    source: Source
    prefix: str
    sizes: Sizes
    experts: range
    block: tuple[int, int]

    def plan(self, entry: Entry) -> list[Stored]:
        """The tensors of an entry: one for each expert, or a single one.

        Raises:
            FileNotFoundError, ValueError: one is missing, of another shape or type; names it and its file.
        """
        names = [entry.tensor(expert) for expert in (self.experts if entry.per_expert else [0])]
        return [self._checked(self.prefix + name, entry) for name in names]

    def read(self, entry: Entry, tensors: list[Stored], dtype: str) -> dict[str, Array]:
        """The arrays of an entry, in the number format of that name; `tensors` is its plan."""
        shape = entry.array_shape(self.sizes)
        shape = (len(self.experts), *shape) if entry.field in OF_EXPERTS else shape
        arrays = {array: np.empty(shape, element_dtype(dtype)) for array in entry.arrays}
        for place, tensor, piece, num_pieces in self._pieces(entry, tensors):
            self._put(arrays, place, entry, tensor, piece, num_pieces)
        return arrays

    def _checked(self, name: str, entry: Entry) -> Stored:
        if name not in self.source.names:
            raise ValueError(f"tensor {name!r} of {entry.field} is missing")
        tensor = stored(self.source, name, self.block)
        check_shape(self.source, tensor.name, tensor.shape, entry.shape(self.sizes))
        stacked = entry.field in OF_EXPERTS and not entry.per_expert
        if stacked and tensor.dtype is None and entry.axes[0] != ("expert",):
            raise ValueError(f"{self.source.where(name)}: tensor {name!r} must not be quantised over experts' edges")
        return tensor

    def _pieces(self, entry: Entry, tensors: list[Stored]) -> Iterator[tuple[tuple[int, ...], Stored, int, int]]:
        """Where each piece belongs, the tensor it is of, which one it is there, and of how many."""
        if entry.field not in OF_EXPERTS:
            yield (), tensors[0], 0, 1
            return
        for position, expert in enumerate(self.experts):
            if entry.per_expert:
                yield (position,), tensors[position], 0, 1
            else:
                yield (position,), tensors[0], expert, self.sizes[entry.num_pieces]

    def _put(
        self,
        arrays: dict[str, Array],
        place: tuple[int, ...],
        entry: Entry,
        tensor: Stored,
        piece: int,
        num_pieces: int,
    ) -> None:
        """Read a piece into its place; when this returns, its memory is free for the next."""
        found = entry.arrange(tensor.read(piece, num_pieces), self.sizes)
        for array, values in zip(arrays.values(), found, strict=True):
            _round_into(array[place], values, tensor.name)


def _round_into(target: Array, values: Array, name: str) -> None:
    """Round numbers into an array.

    Raises:
        ValueError: a finite one is beyond the range of the array's type.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        target[...] = values
    if _largest(target) < _largest(values) and not np.array_equal(np.isfinite(target), np.isfinite(values)):
        raise ValueError(f"dtype must hold all numbers of tensor {name!r}: some are beyond the range of {target.dtype}")


def _largest(array: Array) -> float:
    """Of its type."""
    import ml_dtypes

    return float(ml_dtypes.finfo(array.dtype).max)  # type: ignore[no-untyped-call]
