"""The main loop for Hopper, without a GPU: its PTX is executed here, on bytes, for all 128 threads at once.

`Warpgroup` knows the few instructions that the text uses. TMA writes with the 128-byte swizzle as the CUDA driver API
describes it (chunks of 16 bytes, XOR with the row in an atom of 8 rows); wgmma reads through its descriptor as the PTX
ISA describes it (the XOR is on bits of the address). So offsets, descriptors, stages and phases have to agree with both
descriptions, and the sums with `x @ w.T`, bit for bit: all numbers are small integers.

What it cannot show: what the hardware really does. Multiplications happen as late as the text allows, copies at once or
as late as that, so that a stage that is overwritten too early or read too early shows.
"""

import re

import numpy as np
import pytest

from flashmoe_numba.tile_gemm import hopper
from flashmoe_numba.tile_gemm.hopper import (
    BARRIERS_AT,
    DEPTH_BYTES,
    HALF_COLUMNS,
    INSTRUCTIONS,
    MAP_WORDS,
    ROWS,
    SHARED_ALIGNMENT,
    SHARED_BYTES,
    STAGES,
    STEP_BYTES,
    THREADS,
    WEIGHT_BYTES,
    fragment,
    main_loop,
)
from flashmoe_numba.tile_gemm.matrices import MAX_TILE_COLUMNS, SUMS_STRIDE
from reference import element_dtype

MULTIPROCESSOR_SHARED_BYTES, RESERVED_BYTES, STATIC_BYTES = 233472, 1024, 1024  # of an H100; the last two of a block
SHARED, MAPS = 2048, 1 << 20  # where this test puts them
FULL = MAX_TILE_COLUMNS
DTYPES = tuple(INSTRUCTIONS)


# what the hardware does


class Barrier:
    """An mbarrier of one arrival: a phase ends when that and all announced bytes have come."""

    def __init__(self):
        self.phase, self.arrived, self.missing = 0, False, 0

    def announce(self, num_bytes):
        assert not self.arrived, "a phase was begun twice"
        self.arrived, self.missing = True, num_bytes

    def receive(self, num_bytes):
        assert self.arrived, "bytes beyond those announced: a phase has ended without them"
        self.missing -= num_bytes
        if self.missing == 0:
            self.phase, self.arrived = self.phase + 1, False


class Warpgroup:
    """Registers are arrays over threads. `maps`: address of a map -> (array, box, whether all has come).

    Args:
        late: copies write their bytes when they are waited for, not when they are asked for.
    """

    def __init__(self, operands, maps, dtype, rows, late):
        self.registers = {f"${i}": np.full(THREADS, value, np.int64) for i, value in enumerate(operands)}
        self.registers["%tid.x"] = np.arange(THREADS)
        self.memory = np.full(SHARED + SHARED_BYTES, 0xFF, np.uint8)
        self.maps, self.dtype, self.rows, self.late = maps, element_dtype(dtype), rows, late
        self.barriers, self.copies, self.open, self.groups = {}, [], [], []
        self.copied_bytes = 0

    def run(self, text):
        lines = [line.strip().rstrip(";") for line in text.strip("{}\n").splitlines()]
        labels = {line[:-1]: at for at, line in enumerate(lines) if line.endswith(":")}
        at = 0
        while at < len(lines):
            target = None if lines[at].endswith(":") else self._step(lines[at])
            at = at + 1 if target is None else labels[target]

    def _step(self, line):
        """One instruction; returns the label to go to, if it is a branch that is taken."""
        active = np.ones(THREADS, bool)
        if guard := re.match(r"@(!?)(\w+) ", line):
            active, line = self.registers[guard[2]] ^ bool(guard[1]), line[guard.end() :]
        name, _, rest = line.partition(" ")
        if name == "bra":
            assert active.all() or not active.any(), "threads part ways"
            return rest if active.any() else None
        for pattern, method in METHODS.items():
            if re.fullmatch(pattern, name):
                if active.any():
                    method(self, name, rest, active)
                return None
        raise AssertionError(f"this test does not know {name}: teach it")

    def value(self, operand):
        operand = operand.strip()
        if operand.startswith("0f"):
            return np.full(THREADS, np.frombuffer(bytes.fromhex(operand[2:]), ">f4")[0])
        if operand.lstrip("-").isdigit():
            return np.full(THREADS, int(operand), np.int64)
        return self.registers[operand]

    def one(self, operand):
        """The value of an address with an offset; the same for all threads."""
        name, _, offset = operand.strip(" []").partition("+")
        values = self.value(name)
        return int(values[0]) + int(offset or 0)

    def arithmetic(self, name, rest, active):
        target, *operands = rest.split(",")
        result = OPERATIONS[name.split(".")[0]](*map(self.value, operands))
        if "32" in name.split(".")[-1] and name.split(".")[-1] != "f32":
            result = result.astype(np.int64) & 0xFFFFFFFF
            if name.endswith("s32"):
                result = np.where(result >> 31, result - (1 << 32), result)
        before = self.registers.get(target, result)
        self.registers[target] = np.where(active, result, before)

    def compare(self, name, rest, active):
        target, a, b, *and_also = (part.strip() for part in rest.split(","))
        result = {"eq": np.equal, "gt": np.greater, "lt": np.less}[name.split(".")[1]](self.value(a), self.value(b))
        self.registers[target] = result & self.registers[and_also[0]] if and_also else result

    def nothing(self, name, rest, active):
        """Fences and barriers of threads: here all threads are in step."""

    def mbarrier(self, name, rest, active):
        verb, operands = name.split(".")[1], rest.split(",")
        if verb == "try_wait":
            barrier = self.barriers[self.one(operands[1])]
            self._finish_copies(barrier)
            done = barrier.phase % 2 != int(self.value(operands[2])[0]) % 2
            assert done, f"waits for ever: phase {barrier.phase}, {barrier.missing} bytes missing"
            self.registers[operands[0].strip()] = np.full(THREADS, done)
            return
        assert active.sum() == 1, f"{name} by {active.sum()} threads"
        if verb == "init":
            assert int(operands[1]) == 1
            assert self.one(operands[0]) not in self.barriers, "initialised while in use"
            self.barriers[self.one(operands[0])] = Barrier()
        elif verb == "arrive":
            self.barriers[self.one(operands[1])].announce(int(operands[2]))
        else:
            assert verb == "inval"
            barrier = self.barriers.pop(self.one(operands[0]))
            assert not barrier.arrived, "a copy is still under way"

    def copy(self, name, rest, active):
        assert active.sum() == 1
        to, source, barrier = (part.strip(" []") for part in re.findall(r"\[(?:[^\[\]])*\]", rest))
        map_name, coordinates = source.split(", {")
        at = [int(self.value(c)[0]) for c in coordinates.rstrip("}").split(",")]
        array, box = self.maps[int(self.value(map_name)[0])]
        assert len(at) == len(box) == int(name.split("tensor.")[1][0]) == array.ndim
        tile = box_of(array, at, box)
        copy = (self.one(to), tile, self.barriers[self.one(barrier)])
        self.copied_bytes += tile.size
        self.copies.append(copy)
        if not self.late:
            self._finish_copies(copy[2])

    def _finish_copies(self, barrier):
        for to, tile, its_barrier in self.copies:
            if its_barrier is barrier:
                write_swizzled(self.memory, to, tile)
                barrier.receive(tile.size)
        self.copies = [copy for copy in self.copies if copy[2] is not barrier]

    def multiply(self, name, rest, active):
        sums, a, b, scale, *_ = re.fullmatch(r"\{(.*)\}, (\w+), (\w+), (\w+), (.*)", rest).groups()
        assert self.value(scale).all()
        self.open.append((sums.split(", "), *(int(self.value(d)[0]) for d in (a, b))))

    def commit(self, name, rest, active):
        self.groups.append(self.open)
        self.open = []

    def wait_group(self, name, rest, active):
        while len(self.groups) > int(rest):
            for sums, a, b in self.groups.pop(0):
                self._multiply_now(sums, a, b)

    def _multiply_now(self, sums, a, b):
        left, right = (
            read_operand(self.memory, descriptor, count).view(self.dtype).astype(np.float64)
            for descriptor, count in ((a, HALF_COLUMNS), (b, self.rows))
        )
        product = left @ right.T
        for i, name in enumerate(sums):
            m, n = accumulator_place(np.arange(THREADS), i)
            self.registers[name] = self.registers[name] + product[m, n]

    def store(self, name, rest, active):
        address, value = rest.split("], ")
        base, _, offset = address.strip("[").partition("+")
        at = self.value(base) + int(offset or 0)
        assert (at % 4 == 0).all()
        self.memory.view(np.float32)[at // 4] = self.value(value)


OPERATIONS = {
    "mov": lambda a: a, "cvta": lambda a: a, "cvt": lambda a: a, "add": np.add, "mul": np.multiply,
    "mad": lambda a, b, c: a * b + c, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "shr": np.right_shift,
}  # fmt: skip
METHODS = {
    r"\.reg": Warpgroup.nothing,
    r"(mov|cvta|cvt|add|mul|mad|and|or|xor|shr)\..*": Warpgroup.arithmetic,
    r"setp\..*": Warpgroup.compare,
    r"bar\.sync|fence\..*|wgmma\.fence\..*": Warpgroup.nothing,
    r"mbarrier\..*": Warpgroup.mbarrier,
    r"cp\.async\.bulk\.tensor\..*": Warpgroup.copy,
    r"wgmma\.mma_async\..*": Warpgroup.multiply,
    r"wgmma\.commit_group\..*": Warpgroup.commit,
    r"wgmma\.wait_group\..*": Warpgroup.wait_group,
    r"st\.shared\.f32": Warpgroup.store,
}


def box_of(array, at, box):
    """The bytes `[rows of the box, DEPTH_BYTES]` of a box at coordinates with the innermost first; zeros outside."""
    assert box[0] * array.itemsize == DEPTH_BYTES, "the swizzle is as wide as the box"
    tile = np.zeros(box[::-1], array.dtype)
    inside = [slice(max(c, 0), min(c + n, size)) for c, n, size in zip(at[::-1], box[::-1], array.shape, strict=True)]
    shape = [max(0, s.stop - s.start) for s in inside]
    if all(shape):
        tile[tuple(slice(0, n) for n in shape)] = array[tuple(inside)]
    return tile.reshape(-1, box[0]).view(np.uint8)


def write_swizzled(memory, to, tile):
    """CU_TENSOR_MAP_SWIZZLE_128B: in an atom of 8 rows of 128 bytes, chunk c of row r lies at chunk c XOR r."""
    assert to % SHARED_ALIGNMENT == 0, f"a box at {to} is not at the start of an atom"
    for row, line in enumerate(tile):
        for chunk, data in enumerate(line.reshape(8, 16)):
            at = to + row * DEPTH_BYTES + (chunk ^ row % 8) * 16
            memory[at : at + 16] = data


def read_operand(memory, descriptor, num_rows):
    """`[num_rows, STEP_BYTES]` of a K-major operand, by the fields of its descriptor (PTX ISA, matrix descriptor)."""
    fields = decode(descriptor)
    assert (fields["swizzle"], fields["base_offset"]) == (1, 0)
    row, byte = np.arange(num_rows)[:, None], np.arange(STEP_BYTES)
    address = fields["start"] + row // 8 * fields["stride"] + row % 8 * DEPTH_BYTES + byte
    return np.ascontiguousarray(memory[address ^ (address >> 7 & 7) << 4])


def decode(descriptor):
    return {
        "start": (descriptor & 0x3FFF) << 4,
        "leading": (descriptor >> 16 & 0x3FFF) << 4,
        "stride": (descriptor >> 32 & 0x3FFF) << 4,
        "base_offset": descriptor >> 49 & 7,
        "swizzle": descriptor >> 62 & 3,
    }


def accumulator_place(thread, i):
    """(row, column) of wgmma's D `[64, N]` that register i of a thread holds (PTX ISA, wgmma .m64nNk16, D)."""
    return 16 * (thread // 32) + thread % 32 // 4 + 8 * (i % 4 // 2), 8 * (i // 4) + 2 * (thread % 4) + i % 2


# a tile


class Tile:
    """Some experts' weights and some rows, and one tile of their product."""

    def __init__(self, dtype, rows, depth, gated, seed=0):
        rng = np.random.default_rng(seed)
        self.dtype, self.rows, self.depth, self.parts = dtype, rows, depth, 1 + gated
        self.expert, self.a_row, self.columns = 1, 5, 200
        self.first = HALF_COLUMNS if gated else FULL  # the second tile, of which not all columns are there
        element = element_dtype(dtype)
        make = [(3, self.columns, depth)] * self.parts + [(self.a_row + rows + 2 - 4, depth)]  # the last rows: none
        *self.weights, self.x = (rng.integers(-3, 4, shape).astype(element) for shape in make)

    def operands(self):
        elements = DEPTH_BYTES // self.x.itemsize
        second = self.parts - 1
        second_column = self.first + (1 - second) * HALF_COLUMNS
        blocks = -(-self.depth // elements)
        second_map = MAPS + 8 * MAP_WORDS * second
        return SHARED, MAPS, self.a_row, self.first, second_column, self.expert, blocks, second_map

    def maps(self):
        block = DEPTH_BYTES // self.x.itemsize
        arrays = [(array, (block, HALF_COLUMNS, 1)) for array in (self.weights * 2)[:2]]
        arrays += [(self.x, (block, rows)) for rows in ROWS]
        return {MAPS + 8 * MAP_WORDS * i: entry for i, entry in enumerate(arrays)}

    def run(self, late=False, text=None):
        group = Warpgroup(self.operands(), self.maps(), self.dtype, self.rows, late)
        group.run(main_loop(self.rows, self.dtype) if text is None else text)
        return group

    def expected(self):
        """`[rows, 128]`, zero where there is no row or column."""
        _, _, row, *columns, expert, _, _ = self.operands()
        x = padded(self.x, self.rows, row)
        halves = [padded(w[expert], HALF_COLUMNS, at) for w, at in zip((self.weights * 2)[:2], columns, strict=True)]
        return x @ np.concatenate(halves).T


def padded(array, count, first):
    """`count` rows from `first` on in float64, zeros where there are none."""
    result = np.zeros((count, array.shape[1]))
    there = array[first : first + count]
    result[: len(there)] = there
    return result


def sums_of(group, rows):
    return group.memory[SHARED:].view(np.float32)[: rows * SUMS_STRIDE].reshape(rows, SUMS_STRIDE)[:, :FULL]


def depths(dtype, rows):
    """Elements: less than a block, a ragged end, as many blocks as stages, one more, and several rounds of them."""
    block = DEPTH_BYTES // element_dtype(dtype).itemsize
    return [8, block + 8, STAGES[rows] * block, STAGES[rows] * block + 8, (2 * STAGES[rows] + 1) * block]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_text_makes_the_product(dtype, rows, gated):
    for depth in depths(dtype, rows):
        tile = Tile(dtype, rows, depth, gated, seed=depth)
        for late in (False, True):
            group = tile.run(late)
            case = f"{dtype}, {rows} rows, depth {depth}, late {late}"
            np.testing.assert_array_equal(sums_of(group, rows), tile.expected(), case)
            assert not group.groups and not group.open and not group.copies and not group.barriers, case


@pytest.mark.parametrize("rows", ROWS)
def test_every_byte_of_the_tile_is_copied_once(rows):
    depth = (STAGES[rows] + 2) * 64
    group = Tile("float16", rows, depth, gated=False).run()
    assert group.copied_bytes == (FULL + rows) * depth * 2


FAULTS = [
    ("wgmma.wait_group.sync.aligned 1;", "wgmma.wait_group.sync.aligned 2;"),
    ("@done xor.b32 parity, parity, 1;", ""),
    ("add.u64 b, a, 1026;", "add.u64 b, a, 1028;"),
    ("add.u64 a1, a, 514;", "add.u64 a1, a, 518;"),
    ("mov.u32 at_before, at;", ""),
    ("add.s32 block, k, 5;", "add.s32 block, k, 6;"),
    ("st.shared.f32 [at+528], d1;", "st.shared.f32 [at+4], d1;"),
    ("mad.lo.u32 at, x, 64, at;", "mad.lo.u32 at, x, 128, at;"),
    (" 18432;\n@go cp", " 16384;\n@go cp"),
]


@pytest.mark.parametrize(("right", "wrong"), FAULTS)
def test_a_fault_planted_in_the_text_is_found(right, wrong):
    tile, text = Tile("float16", 16, 13 * 64, gated=True), main_loop(16, "float16")
    assert right in text, "the text has changed: plant another fault"
    np.testing.assert_array_equal(sums_of(tile.run(text=text), 16), tile.expected())
    found = False
    for late in (False, True):
        try:
            sums = sums_of(tile.run(late, text.replace(right, wrong)), 16)
            found |= not np.array_equal(sums, tile.expected())
        except (AssertionError, KeyError, IndexError):
            found = True
    assert found


# single facts


@pytest.mark.parametrize("rows", ROWS)
def test_fragments_cover_the_tile_once(rows):
    places = {fragment(thread, i, half) for thread in range(THREADS) for half in range(2) for i in range(rows // 2)}
    assert places == {(row, column) for row in range(rows) for column in range(FULL)}
    for thread, i, half in ((0, 0, 0), (37, 5, 0), (127, rows // 2 - 1, 1)):
        m, n = accumulator_place(thread, i)
        assert fragment(thread, i, half) == (n, half * HALF_COLUMNS + m)


@pytest.mark.parametrize("rows", ROWS)
def test_sums_are_stored_where_fragment_says(rows):
    lines = main_loop(rows, "float16").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("and.b32 x, thread, 3"))
    group = Warpgroup([SHARED], {}, "float16", rows, late=False)
    group.registers |= {"thread": np.arange(THREADS), "shared": np.full(THREADS, SHARED)}
    for i in range(rows):  # both halves
        group.registers[f"d{i}"] = (np.arange(THREADS) * rows + i).astype(np.float32)
    group.run("\n".join(lines[start:]))
    sums = sums_of(group, rows)
    for thread in range(THREADS):
        for i in range(rows):
            row, column = fragment(thread, i % (rows // 2), i // (rows // 2))
            assert sums[row, column] == thread * rows + i
    stored = [line for line in lines if line.startswith("st.shared")]
    assert len(stored) == rows


@pytest.mark.parametrize("rows", ROWS)
def test_stages_fit_and_are_aligned(rows):
    stage_bytes = WEIGHT_BYTES + rows * DEPTH_BYTES
    assert stage_bytes % SHARED_ALIGNMENT == 0
    assert WEIGHT_BYTES // 2 % SHARED_ALIGNMENT == 0
    assert STAGES[rows] * stage_bytes <= BARRIERS_AT
    assert rows * SUMS_STRIDE * 4 <= BARRIERS_AT, "sums overlap the barriers"
    assert STAGES[rows] >= 3, "one is multiplied, one is being filled, one is ready"


def test_two_blocks_fit_a_multiprocessor():
    assert BARRIERS_AT % 8 == 0
    assert BARRIERS_AT + 8 * max(STAGES.values()) <= SHARED_BYTES
    assert 2 * (SHARED_BYTES + STATIC_BYTES + RESERVED_BYTES) <= MULTIPROCESSOR_SHARED_BYTES


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_instructions_of_the_loop(dtype, rows):
    text = main_loop(rows, dtype)
    before, loop = text.split("DEPTH${:uid}:")
    kind, depth, _ = INSTRUCTIONS[dtype]
    name = f"wgmma.mma_async.sync.aligned.m64n{rows}k{depth}.{kind} "
    assert loop.count(name) == loop.count("wgmma.mma_async") == 2 * DEPTH_BYTES // STEP_BYTES
    assert before.count("wgmma.mma_async") == 0
    assert depth * element_dtype(dtype).itemsize == STEP_BYTES
    assert before.count("cp.async.bulk") == 3 * STAGES[rows]
    assert loop.count("cp.async.bulk") == 3
    boxes = 2 * HALF_COLUMNS * DEPTH_BYTES + rows * DEPTH_BYTES
    announced = {int(number) for number in re.findall(r"expect_tx\S+ _, \[\w+\], (\d+);", text)}
    assert announced == {boxes}
    assert text.count("mbarrier.init") == text.count("mbarrier.inval") == STAGES[rows]


def test_what_ordinary_stores_wrote_is_fenced_before_the_first_copy():
    for rows in ROWS:
        text = main_loop(rows, "bfloat16")
        fence, sync, copy = (text.index(part) for part in ("\nfence.proxy.async;", "bar.sync", "cp.async.bulk"))
        assert fence < sync < copy


def test_the_descriptor_says_swizzle_and_stride():
    assert decode(hopper._DESCRIPTOR) == {"start": 0, "leading": 16, "stride": 1024, "base_offset": 0, "swizzle": 1}
    assert SHARED_BYTES + STATIC_BYTES + RESERVED_BYTES <= 0x3FFF << 4, "an address has 14 bits of 16 bytes"
