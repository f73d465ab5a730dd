"""Memory outside of the arena: reached by its address, unwatched, in real time; what is in no range is a fault."""

import threading
import time

import numpy as np
import pytest
from ptx_kernels import Bench

from flashmoe_numba.ptx import faults
from flashmoe_numba.ptx.faults import PtxFault
from flashmoe_numba.ptx.tensor_map import TensorMap

SEEDS = range(4)


@pytest.fixture
def shared():
    """1024 words that another process could have mapped, from a multiple of 64 bytes on."""
    room = np.zeros(1024 + 8, np.int64)
    words = room[-room.ctypes.data // 8 % 8 :][:1024]
    words[:] = np.arange(1024)
    return words


def make_bench(shared, **options):
    return Bench(foreign=lambda: [(shared.ctypes.data, shared.nbytes)], **options)


@pytest.mark.parametrize(("kind", "register"), [("u16", "%rs10"), ("u32", "%r10"), ("u64", "%rd10")])
def test_values_are_read_and_written_in_place(shared, kind, register):
    bench, size = make_bench(shared), int(kind[1:]) // 8
    bench.run(
        f"mul.lo.s64 %rd11, %rd4, {size}; add.s64 %rd12, %rd11, %rd0; add.s64 %rd13, %rd11, %rd1;"
        f"ld.global.{kind} {register}, [%rd12+64]; st.global.{kind} [%rd13], {register};",
        shared, shared[512:],
    )  # fmt: skip
    expected = np.arange(1024, dtype=np.int64).view(f"u{size}")
    expected[4096 // size :][:32] = expected[64 // size :][:32]
    np.testing.assert_array_equal(shared.view(f"u{size}"), expected)


def test_vectors_go_both_ways(shared):
    bench = make_bench(shared)
    array = bench.array(64, granule=2)
    row = "shl.b64 %rd11, %rd4, 4; add.s64 %rd12, %rd11, %rd0; add.s64 %rd13, %rd11, %rd1;"
    copy = (
        row + "ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd12]; st.global.v4.b32 [%rd13], {%r10, %r11, %r12, %r13};"
    )
    bench.run(copy, shared, array)
    np.testing.assert_array_equal(array, np.arange(64))
    bench.run(copy, array, shared[512:])
    np.testing.assert_array_equal(shared[512:576], np.arange(64))


def test_atomic_operations_of_all_threads_come_true(shared):
    make_bench(shared).run(
        "atom.add.acq_rel.sys.u64 %rd10, [%rd0], 3;"
        "shl.b64 %rd11, %rd4, 3; add.s64 %rd11, %rd11, %rd1; st.release.sys.b64 [%rd11], %rd10;"
        "setp.eq.s32 %p10, %r3, 5; add.s64 %rd12, %rd0, 8; @%p10 atom.cas.acq_rel.sys.b64 %rd13, [%rd12], 1, 77;"
        "setp.eq.s32 %p10, %r3, 6; add.s64 %rd12, %rd0, 16; @%p10 atom.cas.acq_rel.sys.b64 %rd13, [%rd12], 1, 77;",
        shared, shared[512:], blocks=2,
    )  # fmt: skip
    assert shared[:3].tolist() == [3 * 64, 77, 2]
    assert sorted(shared[512:576]) == list(range(0, 3 * 64, 3))


def test_what_is_in_no_range_is_a_fault(shared):
    copy = (
        "fence.proxy.tensormap::generic.acquire.sys [%rd0], 128; mov.u32 %r10, 1024; cp.async.bulk.tensor.2d"
        ".shared::cluster.global.mbarrier::complete_tx::bytes [%r10], [%rd0, {%r10, %r10}], [%r10];"
    )
    for text, code in [
        ("ld.global.u64 %rd10, [%rd0+8192];", faults.OUT_OF_BOUNDS),
        ("ld.global.u64 %rd10, [%rd0+-8];", faults.OUT_OF_BOUNDS),
        ("st.global.u64 [%rd0+8192], %rd2;", faults.OUT_OF_BOUNDS),
        ("add.s64 %rd11, %rd0, 8192; ld.acquire.sys.b64 %rd10, [%rd11];", faults.OUT_OF_BOUNDS),
        ("ld.global.u64 %rd10, [%rd0+4];", faults.MISALIGNED),
        (copy, faults.NO_MAP),
    ]:
        with pytest.raises(PtxFault) as error:
            make_bench(shared).run(text, shared, shared)
        assert error.value.code == code, str(error.value)
    with pytest.raises(PtxFault) as error:
        Bench().run("ld.global.u64 %rd10, [%rd0];", shared, shared)
    assert error.value.code == faults.OUT_OF_BOUNDS


SEND = "@%p0 st.global.u64 [%rd0], %rd3; @%p0 st.{order}.sys.b64 [%rd1], %rd4;"
RECEIVE = (
    "WAIT: ld.{order}.sys.b64 %rd10, [%rd1]; setp.eq.s64 %p10, %rd10, 0; @%p10 bra WAIT; ld.global.u64 %rd11, [%rd0];"
)


def pass_on(shared, seed, order="acquire"):
    """Block 1 writes a word of the arena, and says so in foreign memory; block 0 waits for that and reads."""
    shared[:] = 0
    bench = make_bench(shared, seed=seed, most_steps=1 << 26)
    word = bench.array(1, granule=8, values=0)
    send, receive = SEND.format(order="release"), RECEIVE.format(order=order)
    bench.run(f"@!%p2 bra SEND; {receive} bra END; SEND: {send} END:", word, shared, blocks=2)


def test_foreign_words_order_what_is_in_the_arena(shared):
    for seed in SEEDS:
        pass_on(shared, seed)
        with pytest.raises(PtxFault) as error:
            pass_on(shared, seed, order="relaxed")
        assert error.value.code == faults.RACE


def test_a_box_is_read_from_foreign_memory(shared):
    bench = make_bench(shared)
    facts = dict(data_type=6, strides=(128,), steps=(1, 1), swizzle=0)  # float16
    words = TensorMap(address=shared.ctypes.data, sizes=(64, 64), box=(64, 8), **facts).words()
    maps = bench.array(words.size, granule=8, values=words)
    bench.run(
        "mov.u32 %r10, dynamic; mov.u32 %r11, bar; mov.u32 %r12, 0; mov.u32 %r13, 2;"
        "@%p0 mbarrier.init.shared::cta.b64 [%r11], 1; @%p0 fence.mbarrier_init.release.cluster;"
        "@%p0 fence.proxy.tensormap::generic.acquire.sys [%rd1], 128; bar.sync 0;"
        "@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r11], 1024;"
        "@%p0 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%r10], [%rd1, {%r12, %r13}], [%r11];"
        "WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p10, [%r11], 0; @!%p10 bra WAIT;"
        "cvt.u32.u64 %r14, %rd4; shl.b32 %r14, %r14, 3; add.s32 %r14, %r14, %r10; ld.shared.u64 %rd10, [%r14];"
        "shl.b64 %rd11, %rd4, 3; add.s64 %rd11, %rd11, %rd0; st.global.u64 [%rd11+4096], %rd10;",
        shared, maps, threads=128, shared=".shared .align 8 .u64 bar;\n", dynamic_bytes=1024,
    )  # fmt: skip
    np.testing.assert_array_equal(shared[512:640], np.arange(32, 160))  # from row 2 of 16 words on
    assert bench.machine.poisoned_rows == 0


def test_time_is_real_while_others_may_come(shared):
    """The word comes from outside, while all threads sleep longer than that takes."""
    shared[:3] = 0
    bench = make_bench(shared)

    def come():
        while shared[2] == 0:
            time.sleep(0.001)
        shared[0] = 7

    other = threading.Thread(target=come)
    other.start()
    before = time.monotonic_ns()
    bench.run(
        "mov.u64 %rd12, %globaltimer; @%p1 st.global.u64 [%rd0+8], %rd12; mov.u64 %rd11, 1;"
        "@%p1 st.global.u64 [%rd0+16], %rd11;"
        "WAIT: nanosleep.u32 500000; ld.acquire.sys.b64 %rd10, [%rd0]; setp.eq.s64 %p10, %rd10, 0; @%p10 bra WAIT;",
        shared, shared, blocks=2,
    )  # fmt: skip
    other.join()
    assert before <= shared[1] <= time.monotonic_ns()
