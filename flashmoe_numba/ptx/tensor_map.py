"""A tensor map: how the 128 bytes of a CUtensorMap are laid out here, and which maps the driver refuses.

The driver's own encoding is not published, so this one is ours: 16 int64 words, which only the stand-in's driver writes
and only the machine reads. Dimension 0 is the innermost.

Rules and enumerations: CUDA driver API, "Tensor Map Object Management", cuTensorMapEncodeTiled. Left out: the types of
packed 4 and 6 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from reference.arrays import Array

NUM_WORDS = 16
# Indices of words.
MAGIC = 0  # MAGIC_VALUE, by which bytes that are no map are told apart
DATA_TYPE = 1  # CUtensorMapDataType
RANK = 2
ADDRESS = 3  # of the array
SIZE = 4  # SIZE + i: elements of dimension i; 0 from the rank on
STRIDE = 9  # STRIDE + i: bytes from one index of dimension i + 1 to the next; dimension 0 has none
BOX = 13  # elements of a box, BOX_BITS for each dimension, the innermost in the lowest bits
STEPS = 14  # element strides, STEP_BITS for each dimension, likewise
MODES = 15  # swizzle, fill, interleave and L2 promotion, MODE_BITS each, the swizzle in the lowest bits

MAGIC_VALUE = 0x70616D726F736E74  # "tnsormap"
BOX_BITS, STEP_BITS, MODE_BITS = 12, 4, 8
BOX_MASK, STEP_MASK, MODE_MASK = (1 << BOX_BITS) - 1, (1 << STEP_BITS) - 1, (1 << MODE_BITS) - 1
SWIZZLE_SHIFT, FILL_SHIFT, INTERLEAVE_SHIFT, L2_SHIFT = 0, MODE_BITS, 2 * MODE_BITS, 3 * MODE_BITS

ITEM_BYTES = (1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4)  # by CUtensorMapDataType, UINT8 to TFLOAT32_FTZ
FLOATS = range(6, 13)  # FLOAT16 to TFLOAT32_FTZ
SPAN_BYTES = (0, 32, 64, 128, 128, 128, 128)  # by CUtensorMapSwizzle: what is swizzled within; 0 for none
INTERLEAVE_NONE, INTERLEAVE_16B, INTERLEAVE_32B = range(3)
SWIZZLE_NONE, SWIZZLE_32B, SWIZZLE_64B, SWIZZLE_128B = range(4)
FILL_ZEROS, FILL_NAN = range(2)

MAX_RANK, MAX_SIZE, MAX_STRIDE, MAX_BOX, MAX_STEP, L2_PROMOTIONS = 5, 1 << 32, 1 << 40, 256, 8, 4
ALIGNMENT = 16  # bytes, of the array, its strides and the inner extent of a box


# Readers. Numba compiles them as they are.


def box_elements(words: Array, i: int) -> int:
    """Elements of a box along dimension i."""
    return (words[BOX] >> (BOX_BITS * i)) & BOX_MASK  # type: ignore[no-any-return]


def element_stride(words: Array, i: int) -> int:
    return (words[STEPS] >> (STEP_BITS * i)) & STEP_MASK  # type: ignore[no-any-return]


def swizzle_mode(words: Array) -> int:
    return (words[MODES] >> SWIZZLE_SHIFT) & MODE_MASK  # type: ignore[no-any-return]


def fill_mode(words: Array) -> int:
    return (words[MODES] >> FILL_SHIFT) & MODE_MASK  # type: ignore[no-any-return]


def interleave_mode(words: Array) -> int:
    return (words[MODES] >> INTERLEAVE_SHIFT) & MODE_MASK  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class TensorMap:
    """A tiled view of an array in global memory.

    Args:
        data_type, interleave, swizzle, l2, fill: numbers of the driver's enumerations.
        address: of the array.
        sizes: elements `[rank]`.
        strides: bytes `[rank - 1]`, of dimensions 1 and up.
        box: elements `[rank]` of a tile.
        steps: element strides `[rank]`.

    Raises:
        ValueError: the rule that is broken, and the value.
    """

    data_type: int
    address: int
    sizes: Sequence[int]
    strides: Sequence[int]
    box: Sequence[int]
    steps: Sequence[int]
    interleave: int = INTERLEAVE_NONE
    swizzle: int = SWIZZLE_NONE
    l2: int = 0
    fill: int = FILL_ZEROS

    def __post_init__(self) -> None:
        for rule in self._broken():
            raise ValueError(rule)

    def _broken(self) -> Iterator[str]:
        """What is wrong, in an order in which each rule may rely on those before it."""
        yield from self._broken_modes()
        yield from self._broken_rank()
        yield from self._broken_address()
        yield from self._broken_sizes()
        yield from self._broken_strides()
        yield from self._broken_box()

    def _broken_modes(self) -> Iterator[str]:
        limits = (("data_type", len(ITEM_BYTES)), ("interleave", INTERLEAVE_32B + 1), ("swizzle", len(SPAN_BYTES)))
        for name, end in (*limits, ("l2", L2_PROMOTIONS), ("fill", FILL_NAN + 1)):
            if not 0 <= getattr(self, name) < end:
                yield f"{name} must be in [0, {end - 1}], got {getattr(self, name)}"
        if self.interleave == INTERLEAVE_32B and self.swizzle != SWIZZLE_32B:
            yield f"swizzle must be that of 32 bytes ({SWIZZLE_32B}) with an interleave of 32, got {self.swizzle}"
        if self.fill == FILL_NAN and self.data_type not in FLOATS:
            yield f"fill must be zero unless elements are floating point, got {self.fill} for type {self.data_type}"

    def _broken_rank(self) -> Iterator[str]:
        rank, least = len(self.sizes), 1 if self.interleave == INTERLEAVE_NONE else 3
        if not least <= rank <= MAX_RANK:
            yield f"rank must be in [{least}, {MAX_RANK}], got {rank}"
        for name, wanted in (("strides", rank - 1), ("box", rank), ("steps", rank)):
            if len(getattr(self, name)) != wanted:
                yield f"{name} must have {wanted} entries, got {len(getattr(self, name))}"

    def _broken_address(self) -> Iterator[str]:
        if self.address % self._alignment():
            yield f"address must be a multiple of {self._alignment()}, got {self.address:#x}"

    def _alignment(self) -> int:
        return 2 * ALIGNMENT if self.interleave == INTERLEAVE_32B else ALIGNMENT

    def _broken_sizes(self) -> Iterator[str]:
        if not all(0 < size <= MAX_SIZE for size in self.sizes):
            yield f"sizes must be in [1, 2**32], got {list(self.sizes)}"

    def _broken_strides(self) -> Iterator[str]:
        if any(stride % self._alignment() or not 0 <= stride < MAX_STRIDE for stride in self.strides):
            yield f"strides must be multiples of {self._alignment()} below 2**40, got {list(self.strides)}"
        for i, (stride, size) in enumerate(zip(self.strides, self.sizes, strict=False)):
            unit = ITEM_BYTES[self.data_type] if i == 0 else self.strides[i - 1]
            if stride < unit * size or (i > 0 and stride % unit):
                rule = "each stride must hold the dimension below it, and be a multiple of that one's stride"
                yield f"{rule}: got {list(self.strides)} for sizes {list(self.sizes)}"

    def _broken_box(self) -> Iterator[str]:
        if not all(0 < extent <= MAX_BOX for extent in self.box):
            yield f"box must be in [1, {MAX_BOX}] along each dimension, got {list(self.box)}"
        plain = self.interleave == INTERLEAVE_NONE
        if not all(0 < step <= MAX_STEP for step in self.steps[1 if plain else 0 :]):
            yield f"steps must be in [1, {MAX_STEP}], got {list(self.steps)}"
        inner, span = self.box[0] * ITEM_BYTES[self.data_type], SPAN_BYTES[self.swizzle]
        if plain and inner % ALIGNMENT:
            yield f"box's inner extent must be a multiple of {ALIGNMENT} bytes, got {inner}"
        if plain and span and inner > span:
            yield f"box's inner extent must be at most the swizzle's {span} bytes, got {inner}"

    def words(self) -> Array:
        """int64 `[16]`, what the driver writes."""
        words = np.zeros(NUM_WORDS, np.int64)
        words[MAGIC], words[DATA_TYPE], words[RANK] = MAGIC_VALUE, self.data_type, len(self.sizes)
        words[ADDRESS] = self.address
        words[SIZE : SIZE + len(self.sizes)] = self.sizes
        words[STRIDE : STRIDE + len(self.strides)] = self.strides
        words[BOX], words[STEPS] = _packed(self.box, BOX_BITS), _packed(self._effective_steps(), STEP_BITS)
        words[MODES] = _packed((self.swizzle, self.fill, self.interleave, self.l2), MODE_BITS)
        return words

    def _effective_steps(self) -> Sequence[int]:
        """The innermost is ignored if nothing is interleaved: it counts as 1."""
        return self.steps if self.interleave != INTERLEAVE_NONE else [1, *self.steps[1:]]


def _packed(values: Sequence[int], bits: int) -> int:
    return sum(value << (bits * i) for i, value in enumerate(values))


def decode(words: Array) -> TensorMap:
    """The map that int64 `[16]` words hold, for messages and tests.

    Raises:
        ValueError: they hold none.
    """
    if words[MAGIC] != MAGIC_VALUE:
        raise ValueError(f"words must begin with {MAGIC_VALUE:#x} to be a tensor map, got {int(words[MAGIC]):#x}")
    rank = int(words[RANK])
    return TensorMap(
        data_type=int(words[DATA_TYPE]),
        address=int(words[ADDRESS]),
        sizes=words[SIZE : SIZE + rank].tolist(),
        strides=words[STRIDE : STRIDE + rank - 1].tolist(),
        box=[int(box_elements(words, i)) for i in range(rank)],
        steps=[int(element_stride(words, i)) for i in range(rank)],
        interleave=int(interleave_mode(words)),
        swizzle=int(swizzle_mode(words)),
        l2=int(words[MODES] >> L2_SHIFT & MODE_MASK),
        fill=int(fill_mode(words)),
    )
