"""wgmma's operands, fragments and products, against CuTe's layout algebra and NumPy."""

import numpy as np
import pytest
from layouts import SW128, accumulator, canonical_k_sw128

from flashmoe_numba.ptx import tensors
from flashmoe_numba.ptx.opcodes import BF16, F16, TF32

KINDS = (F16, BF16, TF32)
SHARED_BYTES = 1 << 17
UNTOUCHED = 0xEE  # as bfloat16 or TF32 a large number, so that a wrong address shows


# descriptors


def descriptor(start, stride=1024, leading=16, base_offset=0, swizzle=1, more=0):
    value = start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | base_offset << 49 | swizzle << 62 | more
    return value - (1 << 64) if value >> 63 else value


def test_fields_of_a_descriptor():
    for fields in ((0, 16, 1024, 0, 1), (0x3FFF0, 0, 0x3FFF0, 7, 3), (16, 0x3FFF0, 16, 1, 2), (32, 0, 0, 0, 0)):
        start, leading, stride, base_offset, swizzle = fields
        assert tensors.descriptor_fields(descriptor(start, stride, leading, base_offset, swizzle)) == fields


@pytest.mark.parametrize("item", [2, 4])
@pytest.mark.parametrize("stride", [1024, 2048, 5120])
def test_an_operand_is_addressed_as_cute_says(stride, item):
    layout = canonical_k_sw128(item, 32, stride)
    for start in (0, 1024 + 32, 7168 + 64, 2048 + 96):
        for row, byte in np.ndindex(256, 32):
            wanted = SW128(start + item * layout(row, byte // item)) + byte % item
            assert tensors.operand_address(descriptor(start, stride), row, byte) == wanted


def test_faults_of_operands_are_told():
    def fault(rows=64, shared_bytes=8192, **fields):
        return tensors.operand_fault(descriptor(**fields), rows, shared_bytes)

    assert [fault(start=start) for start in (0, 16, 96)] == [0, 0, 0]
    assert [fault(start=start) for start in (112, 128, 512)] == [tensors.MISPLACED_OPERAND] * 3
    assert [fault(start=0, swizzle=swizzle) for swizzle in (0, 2, 3)] == [tensors.UNMODELLED_SWIZZLE] * 3
    assert [fault(start=0, base_offset=offset) for offset in (1, 7)] == [tensors.UNMODELLED_BASE] * 2
    assert [fault(start=0, stride=stride) for stride in (16, 512, 1040)] == [tensors.STRIDE_OFF_PATTERN] * 3
    strays = [14, 15, 30, 31, 46, 47, 48, *range(52, 62)]
    assert {fault(start=0, more=1 << bit) for bit in strays} == {tensors.STRAY_BITS}
    assert fault(start=0, shared_bytes=8191) == tensors.OPERAND_OUTSIDE
    assert fault(start=1024) == tensors.OPERAND_OUTSIDE
    assert [fault(8, start=7168, stride=2048), fault(16, start=6144, stride=2048)] == [0, tensors.OPERAND_OUTSIDE]


# fragments and products


@pytest.mark.parametrize("n", range(8, 257, 8))
def test_fragments_are_cutes(n):
    layout = accumulator(n)
    for thread, i in np.ndindex(128, n // 2):
        row, column = tensors.fragment_place(thread, i)
        assert row + 64 * column == layout(thread, i)


def bits_of(values, kind):
    """Elements as the operand has them in memory."""
    if kind == F16:
        return values.astype(np.float16).view(np.uint16)
    bits = values.astype(np.float32).view(np.uint32)
    return (bits >> 16).astype(np.uint16) if kind == BF16 else bits


class Operands:
    """A `[64, depth]` and B `[n, depth]` in shared memory, where CuTe says."""

    START_A, START_B, STRIDE_A, STRIDE_B = 1024 + 64, 40960 + 32, 1024, 2048

    def __init__(self, kind, a, b):
        self.kind = kind
        self.shared = np.full(SHARED_BYTES, UNTOUCHED, np.uint8)
        self._write(a, self.START_A, self.STRIDE_A)
        self._write(b, self.START_B, self.STRIDE_B)

    def _write(self, bits, start, stride):
        item = bits.itemsize
        layout = canonical_k_sw128(item, len(bits) // 8, stride)
        for row, k in np.ndindex(*bits.shape):
            self.shared.view(bits.dtype)[SW128(start + item * layout(row, k)) // item] = bits[row, k]

    def multiply(self, n, scale_d=False, d=None):
        """`[64, n]`, by way of the registers."""
        layout, sums = accumulator(n), np.full((128, n // 2), np.nan, np.float32)
        places = np.array([[layout(thread, i) for i in range(n // 2)] for thread in range(128)])
        if d is not None:
            sums[:] = d.T.ravel()[places]
        a, b = descriptor(self.START_A, self.STRIDE_A), descriptor(self.START_B, self.STRIDE_B)
        assert tensors.multiply(sums, self.shared, a, b, n, self.kind, scale_d, np.empty(tensors.ROOM)) == 0
        product = np.empty(64 * n, np.float32)
        product[places] = sums
        return product.reshape(n, 64).T


def depth_of(kind):
    return 8 if kind == TF32 else 16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [8, 16, 24, 64, 128, 256])
def test_products_of_small_integers_are_exact(kind, n):
    rng = np.random.default_rng(n)
    a, b, d = (rng.integers(-3, 4, shape) for shape in ((64, depth_of(kind)), (n, depth_of(kind)), (64, n)))
    operands = Operands(kind, bits_of(a, kind), bits_of(b, kind))
    np.testing.assert_array_equal(operands.multiply(n), a @ b.T)
    np.testing.assert_array_equal(operands.multiply(n, True, d.astype(np.float32)), d + a @ b.T)
    np.testing.assert_array_equal(operands.multiply(n, False, d.astype(np.float32)), a @ b.T)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sum_is_cut_toward_zero(kind):
    rng, n = np.random.default_rng(0), 32
    a, b = (cut_to(kind, rng.standard_normal((rows, depth_of(kind)))) for rows in (64, n))
    d = rng.standard_normal((64, n)).astype(np.float32)
    got = Operands(kind, bits_of(a, kind), bits_of(b, kind)).multiply(n, True, d)
    exact = d + a.astype(np.float64) @ b.astype(np.float64).T
    above = np.nextafter(np.abs(got), np.float32(np.inf))
    assert (np.abs(got) <= np.abs(exact)).all()
    assert (np.abs(exact) < above).all()
    assert (np.sign(got) == np.sign(exact)).all()
    assert 0.3 < (got != exact.astype(np.float32)).mean() < 0.7, "half of them would be rounded away from zero"


def cut_to(kind, values):
    """Values that the operand can hold."""
    if kind == F16:
        return values.astype(np.float16).astype(np.float32)
    low = 16 if kind == BF16 else 13
    return (values.astype(np.float32).view(np.uint32) >> low << low).view(np.float32)


def read_through(kind, patterns):
    """What wgmma reads for bit patterns: products with the identity."""
    depth, read = depth_of(kind), []
    identity = bits_of(np.eye(16)[:, :depth], kind)
    for block in patterns.reshape(-1, 64, depth):
        read.append(Operands(kind, block, identity).multiply(16)[:, :depth])
    return np.concatenate(read).ravel()


def test_every_finite_half_is_read_exactly():
    patterns = np.arange(1 << 16, dtype=np.uint16)
    patterns = patterns[np.isfinite(patterns.view(np.float16))]
    np.testing.assert_array_equal(read_through(F16, patterns), patterns.view(np.float16).astype(np.float32))


def test_bfloat16_is_the_upper_half_of_float32():
    patterns = np.arange(0, 1 << 16, 16, dtype=np.uint16) + np.arange(1 << 12, dtype=np.uint16) % 16
    values = (patterns.astype(np.uint32) << 16).view(np.float32)
    patterns[~np.isfinite(values)] = 0
    np.testing.assert_array_equal(read_through(BF16, patterns), (patterns.astype(np.uint32) << 16).view(np.float32))


def test_tf32_ignores_the_low_13_bits():
    patterns = np.random.default_rng(0).integers(0, 1 << 32, 4096, np.uint32)
    patterns[~np.isfinite(patterns.view(np.float32))] = 0x3F801FFF
    np.testing.assert_array_equal(read_through(TF32, patterns), (patterns & 0xFFFFE000).view(np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_number_stays_so(kind):
    a, b = np.zeros((64, depth_of(kind))), np.zeros((8, depth_of(kind)))
    a[0, 0], a[1, 0], a[2, 0], a[3, 0], b[:, 0] = np.inf, -np.inf, np.nan, 2, 1
    d = Operands(kind, bits_of(a, kind), bits_of(b, kind)).multiply(8)
    np.testing.assert_array_equal(d[:5, 0], [np.inf, -np.inf, np.nan, 2, 0])


def test_a_sum_beyond_float32_is_infinite():
    a, b = np.full((64, 16), 3e38), np.ones((8, 16))
    a[1::2] *= -1
    d = Operands(BF16, bits_of(a, BF16), bits_of(b, BF16)).multiply(8)
    np.testing.assert_array_equal(d, np.where(np.arange(64) % 2, -np.inf, np.inf)[:, None].repeat(8, 1))


def test_a_fault_leaves_the_sums():
    sums = np.ones((128, 4), np.float32)
    right, wrong = descriptor(0), descriptor(0, base_offset=1)
    for a, b in ((right, wrong), (wrong, right)):
        shared = np.zeros(8192, np.uint8)
        assert tensors.multiply(sums, shared, a, b, 8, F16, False, np.empty(tensors.ROOM)) == tensors.UNMODELLED_BASE
    assert (sums == 1).all()


def test_both_operands_must_lie_in_shared_memory():
    def fault(n, shared_bytes):
        sums = np.zeros((128, n // 2), np.float32)
        return tensors.multiply(
            sums, np.zeros(shared_bytes, np.uint8), descriptor(0), descriptor(0), n, F16, False, np.empty(tensors.ROOM)
        )

    assert [fault(64, 8192), fault(128, 8192), fault(8, 4096)] == [0, tensors.OPERAND_OUTSIDE, tensors.OPERAND_OUTSIDE]
