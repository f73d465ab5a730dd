"""What TMA and wgmma do with bytes: boxes of tensor maps, the swizzle, descriptors, fragments, products.

Sources: PTX ISA 5.5 (tensors), 9.7.9.25 (their copies) and 9.7.15.5 (wgmma); CUDA driver API, cuTensorMapEncodeTiled.

The swizzle is on bits of the shared address: those that number lines of 128 bytes go, by XOR, into those that number
chunks of 16 within a line. So copies and descriptors agree wherever a box begins, as long as an operand begins a
pattern at a multiple of its bytes; one that begins elsewhere (a base offset) is not modelled, as are element strides,
interleaving, fills other than zeros, types whose copy changes bits, transposed operands and other swizzles of operands
than that of 128 bytes.

TMA copies bits as they are. Maps of TFLOAT32 may round on hardware (CUTLASS says so, the manuals do not): here the low
bits go when wgmma reads them, which is the larger error of the two.

Everything is numbers and arrays, for the machine's inner loops. A fault is a number, 0 for none: `FAULTS` says which.
"""

from . import tensor_map as words
from .compiled import njit
from .operands import as_float32, cut, item_bytes

(MISSING_MAP, UNMODELLED_MAP, MISALIGNED_BOX, BOX_OUTSIDE_SHARED, BOX_OUTSIDE_GLOBAL) = range(1, 6)
(STRAY_BITS, UNMODELLED_SWIZZLE, UNMODELLED_BASE, MISPLACED_OPERAND, STRIDE_OFF_PATTERN, OPERAND_OUTSIDE) = range(6, 12)
FAULTS = {
    MISSING_MAP: "there is no tensor map at this address",
    UNMODELLED_MAP: "the tensor map asks for what is not modelled: more than 3 dimensions, element strides, "
    "interleaving, another fill than zeros, a swizzle of larger atoms or wider than its box, or a type with FTZ",
    MISALIGNED_BOX: "a box must lie at a multiple of 128 bytes in shared memory",
    BOX_OUTSIDE_SHARED: "a box does not fit into shared memory",
    BOX_OUTSIDE_GLOBAL: "a box reads outside of global memory",
    STRAY_BITS: "a descriptor has bits outside of its fields",
    UNMODELLED_SWIZZLE: "a descriptor asks for what is not modelled: other swizzles than that of 128 bytes",
    UNMODELLED_BASE: "a descriptor asks for what is not modelled: a base offset",
    MISPLACED_OPERAND: "an operand must begin in the first line of a swizzle pattern, with 32 bytes in that line",
    STRIDE_OFF_PATTERN: "an operand's groups of 8 rows must lie a multiple of 1024 bytes apart",
    OPERAND_OUTSIDE: "an operand does not fit into shared memory",
}

MAX_BOX_RANK = 3
BOX_ALIGNMENT, SWIZZLE_LINE, CHUNK = 128, 128, 16  # bytes
PATTERN = 8 * SWIZZLE_LINE  # of the 128-byte swizzle
STEP = 32  # bytes of depth of one wgmma
M, MAX_N, WARPGROUP = 64, 256, 128  # of its D, and its threads
ROOM = M * MAX_N + (M + MAX_N) * STEP // 2  # float64 that a product is made in
DESCRIPTOR_SWIZZLE_128B = 1
NO_FIELD = 3 << 14 | 3 << 30 | 7 << 46 | 0x3FF << 52  # bits of a descriptor
FLUSHED = (10, 12)  # CUtensorMapDataType FLOAT32_FTZ and TFLOAT32_FTZ

box_elements = njit(words.box_elements)
element_stride = njit(words.element_stride)
swizzle_mode = njit(words.swizzle_mode)
fill_mode = njit(words.fill_mode)
interleave_mode = njit(words.interleave_mode)


# tensor maps and boxes


@njit
def map_fault(map_words):
    """What keeps a map from being used, as a number of FAULTS; to be asked before all that follows."""
    kind, rank, mode = map_words[words.DATA_TYPE], map_words[words.RANK], swizzle_mode(map_words)
    if map_words[words.MAGIC] != words.MAGIC_VALUE or kind < 0 or kind >= len(words.ITEM_BYTES):
        return MISSING_MAP
    if rank > MAX_BOX_RANK or kind in FLUSHED or mode > words.SWIZZLE_128B:
        return UNMODELLED_MAP
    for i in range(rank):
        if element_stride(map_words, i) != 1:
            return UNMODELLED_MAP
    if interleave_mode(map_words) != words.INTERLEAVE_NONE or fill_mode(map_words) != words.FILL_ZEROS:
        return UNMODELLED_MAP
    if mode != words.SWIZZLE_NONE and row_bytes(map_words) != words.SPAN_BYTES[mode]:
        return UNMODELLED_MAP
    return 0


@njit
def row_bytes(map_words):
    """Bytes of a row of a box: of its innermost dimension."""
    return box_elements(map_words, 0) * words.ITEM_BYTES[map_words[words.DATA_TYPE]]


@njit
def box_rows(map_words):
    """Rows of a box: all but its innermost dimension."""
    rows = 1
    for i in range(1, map_words[words.RANK]):
        rows *= box_elements(map_words, i)
    return rows


@njit
def box_bytes(map_words):
    """Bytes that a box brings to its mbarrier: all of it, also what is filled (PTX ISA 5.5.3.3)."""
    return box_rows(map_words) * row_bytes(map_words)


@njit
def box_source(map_words, c0, c1, c2, row):
    """(address, bytes) of global memory that a row of a box reads; no bytes if it lies outside of the array.

    Args:
        c0, c1, c2: coordinates of the box's first element, the innermost first; of dimensions that are not there 0.
        row: in `box_rows`.
    """
    address = map_words[words.ADDRESS]
    for i in range(1, map_words[words.RANK]):
        extent = box_elements(map_words, i)
        at = (c1 if i == 1 else c2) + row % extent
        if at < 0 or at >= map_words[words.SIZE + i]:
            return address, 0
        address += at * map_words[words.STRIDE + i - 1]
        row //= extent
    item = words.ITEM_BYTES[map_words[words.DATA_TYPE]]
    first, end = max(c0, 0), min(c0 + box_elements(map_words, 0), map_words[words.SIZE])
    return address + first * item, max(0, end - first) * item


@njit
def swizzled(address, mode):
    """Where a byte that would lie at a shared address lies under a CUtensorMapSwizzle, of 16-byte atoms (5.5.7)."""
    if mode == words.SWIZZLE_NONE:
        return address
    lines = words.SPAN_BYTES[mode] // CHUNK - 1
    return address ^ (address // SWIZZLE_LINE & lines) * CHUNK


@njit
def copy_box(map_words, c0, c1, c2, shared, at, global_bytes, global_base):
    """Write a box into shared memory, with the map's swizzle and zeros for what lies outside of the array.

    The swizzle moves chunks within their lines, so exactly the bytes `[at, at + box_bytes)` are written.

    Args:
        map_words: int64 `[16]`, see tensor_map.py.
        c0, c1, c2: as of `box_source`.
        shared: uint8, a block's shared memory from its address 0 on.
        at: the shared address of the box.
        global_bytes: uint8, what lies from the address `global_base` on.

    Returns:
        0, or a number of FAULTS; then the box is not, or not wholly, written.
    """
    fault = map_fault(map_words)
    if fault:
        return fault
    mode, length, rows = swizzle_mode(map_words), row_bytes(map_words), box_rows(map_words)
    if at % BOX_ALIGNMENT:  # a swizzle follows the address, wherever its pattern begins (5.5.7, swizzle base offset)
        return MISALIGNED_BOX
    if at < 0 or at + rows * length > len(shared):
        return BOX_OUTSIDE_SHARED
    ahead = max(0, -c0) * words.ITEM_BYTES[map_words[words.DATA_TYPE]]  # zeros before the first byte
    for row in range(rows):
        address, num_bytes = box_source(map_words, c0, c1, c2, row)
        source = address - global_base
        if num_bytes and (source < 0 or source + num_bytes > len(global_bytes)):
            return BOX_OUTSIDE_GLOBAL
        _write_row(shared, at + row * length, length, mode, global_bytes, source - ahead, ahead, ahead + num_bytes)
    return 0


@njit
def _write_row(shared, at, length, mode, global_bytes, source, first, end):
    """A row of a box from `source` on, of which only bytes `[first, end)` are there."""
    for chunk in range(0, length, CHUNK):
        to = swizzled(at + chunk, mode)
        if first <= chunk and chunk + CHUNK <= end:
            for i in range(CHUNK):
                shared[to + i] = global_bytes[source + chunk + i]
        else:
            for i in range(CHUNK):
                there = first <= chunk + i < end
                shared[to + i] = global_bytes[source + chunk + i] if there else 0


# wgmma


@njit
def descriptor_fields(descriptor):
    """(start, leading byte offset, stride byte offset, base offset, swizzle) of a matrix descriptor (9.7.15.5.1.2.2).

    The first three in bytes; `descriptor` as int64.
    """
    start = (descriptor & 0x3FFF) << 4
    leading = (descriptor >> 16 & 0x3FFF) << 4
    stride = (descriptor >> 32 & 0x3FFF) << 4
    return start, leading, stride, descriptor >> 49 & 7, descriptor >> 62 & 3


@njit
def operand_fault(descriptor, num_rows, shared_bytes):
    """What keeps an operand from being read, as a number of FAULTS.

    Args:
        num_rows: 64 of A, N of B.
        shared_bytes: of the block's shared memory.
    """
    start, _, stride, base_offset, swizzle = descriptor_fields(descriptor)
    if descriptor & NO_FIELD:
        return STRAY_BITS
    if swizzle != DESCRIPTOR_SWIZZLE_128B:
        return UNMODELLED_SWIZZLE
    if base_offset:
        return UNMODELLED_BASE
    if start % PATTERN > SWIZZLE_LINE - STEP:
        return MISPLACED_OPERAND
    if stride % PATTERN:
        return STRIDE_OFF_PATTERN
    if start // PATTERN * PATTERN + (num_rows // 8 - 1) * stride + PATTERN > shared_bytes:
        return OPERAND_OUTSIDE
    return 0


@njit
def operand_address(descriptor, row, byte):
    """The shared address of a byte of a K-major operand with the 128-byte swizzle (9.7.15.5.1.2.1.3).

    Args:
        descriptor: without an `operand_fault`.
        row: of A, or of B as `[N, depth]`.
        byte: along the depth, in `[0, 32)`. 16 bytes from a multiple of 16 on lie together.
    """
    start, _, stride, _, _ = descriptor_fields(descriptor)
    return swizzled(start + row // 8 * stride + row % 8 * SWIZZLE_LINE + byte, words.SWIZZLE_128B)


@njit
def fragment_place(thread, i):
    """(row, column) of D `[64, N]` that register i of a thread of the warpgroup holds (9.7.15.5.1.1.1, Figure 149)."""
    row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (i // 2 % 2)
    return row, 8 * (i // 4) + 2 * (thread % 4) + i % 2


@njit
def multiply(sums, shared, descriptor_a, descriptor_b, n, kind, scale_d, room):
    """One wgmma m64nNk(32 bytes): D = A @ B.T, or D += A @ B.T if `scale_d`; operands neither negated nor transposed.

    The ISA leaves the order and the rounding of sums open (9.7.15.5.2). Our choice: the products of one instruction are
    added to D in float64, and what comes out is cut to float32, toward zero, as hardware is known to lose low bits. A
    sum beyond float32 is infinite.

    Args:
        sums: float32 `[128, N / 2]`, registers of D by thread: see `fragment_place`.
        shared: uint8, a block's shared memory from its address 0 on.
        descriptor_a, descriptor_b: int64, of A `[64, depth]` and B `[N, depth]`.
        n: N, a multiple of 8 up to 256.
        kind: F16, BF16 or TF32 of opcodes.py.
        room: float64 `[ROOM]`, of any contents.

    Returns:
        0, or a number of FAULTS; then `sums` is as it was.
    """
    fault_a, fault_b = operand_fault(descriptor_a, M, len(shared)), operand_fault(descriptor_b, n, len(shared))
    if fault_a or fault_b:
        return fault_a or fault_b
    depth = STEP // item_bytes(kind)
    d, rest = room[: M * n].reshape(M, n), room[M * n :]
    a, b = rest[: M * depth].reshape(M, depth), rest[M * depth : (M + n) * depth].reshape(depth, n)
    for m in range(M):
        for k in range(depth):
            a[m, k] = as_float32(shared, operand_address(descriptor_a, m, k * item_bytes(kind)), kind)
    for row in range(n):
        for k in range(depth):
            b[k, row] = as_float32(shared, operand_address(descriptor_b, row, k * item_bytes(kind)), kind)
    for thread in range(WARPGROUP):
        for i in range(n // 2):
            d[fragment_place(thread, i)] = sums[thread, i] if scale_d else 0
    _add_products(d, a, b)
    for thread in range(WARPGROUP):
        for i in range(n // 2):
            sums[thread, i] = cut(d[fragment_place(thread, i)])
    return 0


@njit
def _add_products(d, a, b):
    """`d += a @ b`, a row of b at a time, so that the compiler can use vectors."""
    for m in range(d.shape[0]):
        for k in range(a.shape[1]):
            for n in range(d.shape[1]):
                d[m, n] += a[m, k] * b[k, n]
