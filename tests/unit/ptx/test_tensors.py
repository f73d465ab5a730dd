"""TMA's boxes and their swizzle, against CuTe's layout algebra, the ISA's tables, and NumPy."""

import numpy as np
import pytest
from layouts import SWIZZLES, Layout, Swizzle, atom_k_sw128, size

from flashmoe_numba.ptx import tensor_map, tensors
from flashmoe_numba.ptx.tensor_map import ITEM_BYTES, SPAN_BYTES, TensorMap

UINT8, UINT16, UINT32, UINT64 = 0, 1, 2, 4  # CUtensorMapDataType
BASE = 4096  # address of the first byte of global memory here
SHARED_BYTES = 1 << 17
UNTOUCHED = 0xEE


# the oracle itself


def test_layouts_count_as_in_cutes_documentation():
    layout = Layout((2, (2, 2)), (4, (2, 1)))
    assert [[layout(row, column) for column in range(4)] for row in range(2)] == [[0, 2, 1, 3], [4, 6, 5, 7]]
    assert layout(1, (1, 0)) == layout(1, 1) == layout(3) == 6
    assert size(layout.shape) == 8


def test_a_swizzle_as_drawn_in_cutes_header():
    """0b YY xxxxxxxxx ZZ xxx: two bits, three that stay, eleven from the ones to the others."""
    swizzle = Swizzle(2, 3, 11)
    assert [swizzle(y << 14 | 0b01 << 3 | 5) >> 3 & 3 for y in range(4)] == [0b01, 0b00, 0b11, 0b10]
    assert swizzle(0x3F07) == 0x3F07, "other bits stay"


# swizzle

TABLES = {  # PTX ISA 5.5.7: for each line of 128 bytes, the numbers of the chunks of 16 that lie there
    0: ["01234567"],
    1: ["01234567", "10325476"],
    2: ["01234567", "10325476", "23016745", "32107654"],
    3: ["01234567", "10325476", "23016745", "32107654", "45670123", "54761032", "67452301", "76543210"],
}


@pytest.mark.parametrize("mode", TABLES)
def test_the_swizzle_is_that_of_the_tables_and_of_cute(mode):
    lines = TABLES[mode]
    for address in range(4 * 1024):
        line, chunk = address // 128, address % 128 // 16
        place = lines[line % len(lines)].index(str(chunk))
        assert tensors.swizzled(address, mode) == line * 128 + place * 16 + address % 16
        assert tensors.swizzled(address, mode) == SWIZZLES[mode](address)


# boxes


class Global:
    """An array of numbers that all differ, `sizes` with the innermost first, with room between its rows."""

    def __init__(self, data_type, sizes):
        self.data_type, self.sizes, self.item = data_type, sizes, ITEM_BYTES[data_type]
        self.strides = [-(-sizes[0] * self.item // 16) * 16 + 16]
        for length in sizes[1:-1]:
            self.strides.append(self.strides[-1] * (length + 2))
        steps = [self.item, *self.strides][: len(sizes)]
        self.bytes = np.full(steps[-1] * sizes[-1], UNTOUCHED, np.uint8)
        self.values = np.ndarray(sizes[::-1], f"<u{self.item}", self.bytes, strides=steps[::-1])
        self.values[...] = np.arange(1, self.values.size + 1).reshape(sizes[::-1])
        self.addresses = sum(step * i for step, i in zip(steps[::-1], np.indices(sizes[::-1]), strict=True)) + BASE

    def map(self, box, swizzle=0, **changes):
        facts = dict(address=BASE, sizes=self.sizes, strides=self.strides[: len(box) - 1], box=box, swizzle=swizzle)
        return TensorMap(**dict(data_type=self.data_type, steps=[1] * len(box)) | facts | changes).words()


def cut_out(array, at, box):
    """A box at coordinates with the innermost first, zeros outside: by padding."""
    room = [max(abs(c), abs(c + extent)) + extent for c, extent in zip(at[::-1], box[::-1], strict=True)]
    padded = np.pad(array, [(n, n) for n in room])
    starts = [c + n for c, n in zip(at[::-1], room, strict=True)]
    return padded[tuple(slice(start, start + extent) for start, extent in zip(starts, box[::-1], strict=True))]


ARRAYS = [
    (UINT8, (17, 4, 3)),
    (UINT16, (20, 5, 3)),
    (UINT16, (21, 5)),
    (UINT16, (77,)),
    (UINT32, (40, 4, 2)),
    (UINT64, (9, 3)),
]


@pytest.mark.parametrize("mode", range(4))
@pytest.mark.parametrize(("data_type", "sizes"), ARRAYS)
def test_every_box_lies_as_cute_says(data_type, sizes, mode):
    """Wherever it begins: at a repeat of the swizzle's pattern, or at any line."""
    array = Global(data_type, sizes)
    row_bytes = SPAN_BYTES[mode] or 48
    box = (row_bytes // array.item, 4, 2)[: len(sizes)]
    map_words = array.map(box, mode)
    spaces = [sorted({-box[0], 1 - box[0], -3, -1, 0, 1, 3, sizes[0] - box[0], sizes[0] - 1, sizes[0]})]
    spaces += [range(-extent, size_ + 1) for extent, size_ in zip(box[1:], sizes[1:], strict=True)]
    for number, indices in enumerate(np.ndindex(*map(len, spaces))):
        at = 3 * 1024 + 128 * (number % 8)
        corner = [space[i] for space, i in zip(spaces, indices, strict=True)]
        shared = np.full(SHARED_BYTES // 8, UNTOUCHED, np.uint8)
        assert tensors.copy_box(map_words, *padded_to_three(corner), shared, at, array.bytes, BASE) == 0
        plain = np.ascontiguousarray(cut_out(array.values, corner, box)).view(np.uint8).ravel()
        places = [SWIZZLES[mode](at + i) for i in range(len(plain))]
        assert sorted(places) == list(range(at, at + len(plain)))
        np.testing.assert_array_equal(shared[places], plain, f"box at {corner}")
        shared[places] = UNTOUCHED
        assert (shared == UNTOUCHED).all(), "nothing else was written"
        assert tensors.box_bytes(map_words) == len(plain)


def padded_to_three(coordinates):
    return (*coordinates, 0, 0)[:3]


@pytest.mark.parametrize(("data_type", "sizes"), ARRAYS)
def test_the_source_of_a_box_is_what_lies_inside_of_the_array(data_type, sizes):
    array = Global(data_type, sizes)
    box = (48 // array.item, 4, 2)[: len(sizes)]
    map_words = array.map(box)
    for corner in ((-5, -1, -1), (0, 0, 0), (sizes[0] - 2, 2, 1), (0, -9, 0), (90, 0, 0), (3, 1, 2)):
        found = []
        for row in range(tensors.box_rows(map_words)):
            address, num_bytes = tensors.box_source(map_words, *padded_to_three(corner[: len(sizes)]), row)
            found += range(address, address + num_bytes, array.item)
        inside = cut_out(array.addresses, corner[: len(sizes)], box)
        assert found == inside[inside > 0].tolist(), corner


def test_a_box_of_two_byte_elements_is_cutes_atom():
    """The whole way: TMA's box, then the index that CuTe's own atom gives an element."""
    for data_type, item in ((UINT16, 2), (UINT32, 4)):
        array = Global(data_type, (128 // item, 8))
        shared = np.zeros(1024, np.uint8)
        assert tensors.copy_box(array.map((128 // item, 8), 3), 0, 0, 0, shared, 0, array.bytes, BASE) == 0
        swizzle, layout = atom_k_sw128(item)
        elements = shared.view(f"<u{item}")
        for row, k in np.ndindex(8, 128 // item):
            assert elements[swizzle(layout(row, k))] == array.values[row, k]


def broken(words, at, value):
    words = words.copy()
    words[at] = value
    return words


def copy(map_words, at=1024, shared_bytes=4096, base=BASE, missing=0):
    array = Global(UINT16, (64, 16))
    shared = np.full(shared_bytes, UNTOUCHED, np.uint8)
    return tensors.copy_box(map_words, 0, 0, 0, shared, at, array.bytes[: len(array.bytes) - missing], base)


def test_boxes_of_one_row_put_together_a_box_of_eight():
    """A swizzle follows the address: each may begin at any line."""
    array = Global(UINT16, (64, 16))
    whole, parts = (np.zeros(4096, np.uint8) for _ in range(2))
    assert tensors.copy_box(array.map((64, 8), 3), 0, 3, 0, whole, 1024, array.bytes, BASE) == 0
    for row in range(8):
        one = array.map((64, 1), 3)
        assert tensors.copy_box(one, 0, 3 + row, 0, parts, 1024 + 128 * row, array.bytes, BASE) == 0
    np.testing.assert_array_equal(parts, whole)
    assert whole.any()


def test_faults_of_boxes_are_told():
    array = Global(UINT16, (64, 16))
    right = array.map((64, 8), 3)
    assert copy(right) == 0
    no_maps = [broken(right, tensor_map.MAGIC, 1), *(broken(right, tensor_map.DATA_TYPE, kind) for kind in (-1, 13))]
    assert [copy(words) for words in no_maps] == [tensors.MISSING_MAP] * 3
    unmodelled = [
        array.map((64, 8), 3, steps=[1, 2]),
        array.map((32, 8), 3),
        array.map((64, 8), 4),
        array.map((64, 8), 3, data_type=6, fill=1),
        Global(UINT16, (64, 2, 2, 2)).map((64, 1, 1, 1), 3),
        Global(UINT16, (64, 2, 2)).map((64, 1, 1), 0, interleave=1),
        Global(UINT32, (32, 16)).map((32, 8), 3, data_type=12),
    ]
    assert [copy(words) for words in unmodelled] == [tensors.UNMODELLED_MAP] * len(unmodelled)
    assert [copy(right, at) for at in (1040, 1024 + 64, 1024 + 128)] == [tensors.MISALIGNED_BOX] * 2 + [0]
    plain = array.map((64, 8))
    assert [copy(plain, at) for at in (1024 + 64, 1024 + 128)] == [tensors.MISALIGNED_BOX, 0]
    assert [copy(right, 3072), copy(right, 4096)] == [0, tensors.BOX_OUTSIDE_SHARED]
    assert copy(right, 3072, 4095) == tensors.BOX_OUTSIDE_SHARED
    assert [copy(right, base=BASE + 1), copy(right, base=1 << 40)] == [tensors.BOX_OUTSIDE_GLOBAL] * 2
    last = array.map((64, 16), 3)
    assert [copy(last, missing=16), copy(last, missing=17)] == [0, tensors.BOX_OUTSIDE_GLOBAL]
