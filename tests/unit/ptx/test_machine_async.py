"""Rules about mbarriers, TMA and wgmma: a kernel that copies a tile and multiplies it, with one place broken."""

from pathlib import Path

import numpy as np
import pytest
import test_machine
from ptx_kernels import Bench

from flashmoe_numba.ptx import faults, state
from flashmoe_numba.ptx.faults import PtxFault
from flashmoe_numba.ptx.tensor_map import NUM_WORDS, SWIZZLE_128B, TensorMap

SEEDS = range(6)
ROWS, ROW_BYTES, FLOAT16 = 64, 128, 6
TILE_BYTES = ROWS * ROW_BYTES
SHARED = ".shared .align 8 .b8 bar[80];\n"
DESCRIPTOR = 1 << 62 | 64 << 32 | 1 << 16  # 128-byte swizzle, 1024 bytes from 8 rows to the next 8

# What the kernel does, in order. Each thread stores 16 bytes of the tile and its 4 sums.
COPY = "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
MULTIPLY = "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16"
PARTS = {
    "names": "mov.u32 %r10, dynamic; mov.u32 %r11, bar; mov.u32 %r12, 0;"
    "mul.wide.u32 %rd14, %r0, 16; add.s64 %rd13, %rd14, %rd0;",
    "init": "@%p0 mbarrier.init.shared::cta.b64 [%r11], 1;",
    "fence_init": "@%p0 fence.mbarrier_init.release.cluster;",
    "fence_map": "@%p0 fence.proxy.tensormap::generic.acquire.sys [%rd1], 128;",
    "meet": "bar.sync 0;",
    "expect": "@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r11], 8192;",
    "copy": f"@%p0 {COPY} [%r10], [%rd1, {{%r12, %r12}}], [%r11];",
    "wait": "WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p10, [%r11], 0; @!%p10 bra WAIT;",
    "zero": "".join(f"mov.f32 %f{10 + i}, 0f00000000;" for i in range(4)) + "setp.eq.u32 %p11, 0, 0;",
    "descriptor": f"shr.u32 %r14, %r10, 4; cvt.u64.u32 %rd12, %r14; or.b64 %rd12, %rd12, {DESCRIPTOR};",
    "fence": "wgmma.fence.sync.aligned;",
    "multiply": f"{MULTIPLY} {{%f10, %f11, %f12, %f13}}, %rd12, %rd12, %p11, 1, 1, 0, 0;",
    "commit": "wgmma.commit_group.sync.aligned;",
    "wait_group": "wgmma.wait_group.sync.aligned 0;",
    "store": "".join(f"st.global.f32 [%rd13+{TILE_BYTES + 4 * i}], %f{10 + i};" for i in range(4)),
    "read": "cvt.u32.u64 %r15, %rd14; add.s32 %r15, %r15, %r10;"
    "ld.shared.u64 %rd15, [%r15]; st.global.u64 [%rd13+16384], %rd15;",
    "end": "bar.sync 0; @%p0 mbarrier.inval.shared::cta.b64 [%r11];",
}  # fmt: skip


def tensor_map(room, rows):
    """Of so many rows at the begin of an array, as one box."""
    return TensorMap(
        data_type=FLOAT16, address=room.ctypes.data, sizes=(64, rows), strides=(ROW_BYTES,), box=(64, rows),
        steps=(1, 1), swizzle=SWIZZLE_128B,
    )  # fmt: skip


def run(seed=0, threads=128, **changes):
    """(the tile, its first 2048 bytes as they came to shared memory, the sums) of the kernel with other parts."""
    bench = Bench(seed=seed)
    room = bench.array(3 * TILE_BYTES, np.uint8)
    tile = room[:TILE_BYTES].view(np.float16)
    tile[:] = np.random.default_rng(1).integers(-4, 5, tile.size)
    bench.arena.wrote(room.ctypes.data, TILE_BYTES)
    where = bench.array(NUM_WORDS, granule=8, values=tensor_map(room, ROWS).words())
    assert not changes.keys() - PARTS.keys()
    bench.run(
        "\n".join((PARTS | changes).values()), room, where, shared=SHARED, threads=threads, dynamic_bytes=TILE_BYTES
    )
    sums = room[TILE_BYTES : TILE_BYTES + 2048].view(np.float32)
    return tile.reshape(ROWS, 64), room[2 * TILE_BYTES : 2 * TILE_BYTES + 2048].view(np.int64), sums


def test_the_tile_comes_swizzled_and_is_multiplied():
    for seed in SEEDS:
        tile, shared, sums = run(seed)
        chunks = tile.view(np.int64).reshape(ROWS, 8, 2)[:, :, 0]  # the first half of each 16 bytes
        rows, places = np.divmod(np.arange(128), 8)
        np.testing.assert_array_equal(shared[::2], chunks[rows, places ^ rows % 8])
        thread, i = np.divmod(np.arange(512), 4)
        row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (i // 2)
        product = tile[:, :16].astype(np.float32) @ tile[:8, :16].T.astype(np.float32)
        np.testing.assert_array_equal(sums, product[row, 2 * (thread % 4) + i % 2])


def part(name, old, new):
    """A change of one part."""
    assert old in PARTS[name]
    return {name: PARTS[name].replace(old, new)}


def more(name, after):
    return {name: PARTS[name] + after}


NINE_MBARRIERS = "".join(f"@%p0 mbarrier.init.shared::cta.b64 [%r11+{8 * i}], 1;" for i in range(9))
MAPS_AND_ONE = "".join(
    f"@%p0 fence.proxy.tensormap::generic.acquire.sys [%rd1+{128 * i}], 128;" for i in range(state.MAPS + 1)
)
AGAIN = "fence.proxy.async; bar.sync 0;" + PARTS["expect"] + PARTS["copy"]
BROKEN = {
    "an mbarrier is never made": (faults.MBARRIER_STATE, dict(init="")),
    "an mbarrier is made twice": (faults.MBARRIER_STATE, dict(init=2 * PARTS["init"])),
    "too many mbarriers": (faults.MBARRIER_STATE, dict(init=NINE_MBARRIERS)),
    "one arrives who need not": (faults.MBARRIER_STATE, dict(expect=2 * PARTS["expect"])),
    "an mbarrier is gone while in use": (faults.MBARRIER_STATE, dict(wait=PARTS["end"], end="")),
    "bytes of no copy": (faults.STEP_LIMIT, part("expect", "8192", "8208")),
    "too few bytes are expected": (faults.MBARRIER_BYTES, part("expect", "8192", "8176")),
    "nobody arrives": (faults.STEP_LIMIT, dict(expect="")),
    "the wait is for the phase before": (faults.RACE, part("wait", "], 0;", "], 1;")),
    "an mbarrier's making is not fenced": (faults.MBARRIER_UNFENCED, dict(fence_init="")),
    "an mbarrier is read": (faults.MBARRIER_TOUCHED, more("fence_map", "@%p0 ld.shared.u64 %rd15, [%r11];")),
    "an mbarrier is written": (faults.MBARRIER_TOUCHED, more("fence_map", "@%p0 st.shared.u64 [%r11], %rd2;")),
    "a map is not fenced": (faults.MAP_UNFENCED, dict(fence_map="")),
    "another map is fenced": (faults.MAP_UNFENCED, part("fence_map", "%rd1", "%rd0")),
    "too many maps": (faults.TOO_MANY, dict(fence_map=MAPS_AND_ONE)),
    "no map": (faults.NO_MAP, part("copy", "[%rd1,", "[%rd0,")),
    "a misaligned map": (faults.MISALIGNED, dict(copy="add.s64 %rd1, %rd1, 16;" + PARTS["copy"])),
    "a map nowhere": (faults.OUT_OF_BOUNDS, dict(copy="add.s64 %rd1, %rd1, 256;" + PARTS["copy"])),
    "a box that begins between": (faults.COPY_PLACE, part("copy", "[%r10]", "[%r10+16]")),
    "a box that begins within the swizzle": (faults.COPY_PLACE, part("copy", "[%r10]", "[%r10+512]")),
    "a box that ends outside": (faults.COPY_PLACE, part("copy", "[%r10]", "[%r10+1024]")),
    "nobody waits": (faults.RACE, dict(wait="")),
    "shared memory is written meanwhile": (faults.RACE, dict(wait="@%p0 st.shared.u64 [%r10], %rd2;" + PARTS["wait"])),
    "half a warp fences": (faults.DIVERGED, dict(fence="setp.lt.s32 %p12, %r0, 16; @%p12 wgmma.fence.sync.aligned;")),
    "operands differ": (faults.DIVERGED, part("descriptor", "or.b64", "add.s64 %rd12, %rd12, %rd2; or.b64")),
    "a descriptor of no swizzle": (faults.DESCRIPTOR, part("descriptor", str(DESCRIPTOR), str(DESCRIPTOR - (1 << 62)))),
    "a descriptor's stride": (faults.DESCRIPTOR, part("descriptor", str(DESCRIPTOR), str(DESCRIPTOR + (64 << 32)))),
    "a descriptor's address": (faults.DESCRIPTOR, part("descriptor", "shr.u32 %r14, %r10, 4", "shr.u32 %r14, %r10, 3")),
    "an operand that nobody wrote": (faults.UNINITIALISED, dict(expect="", copy="", wait="")),
    "sums are not fenced": (faults.WGMMA_UNFENCED, dict(fence="")),
    "sums are written behind the fence": (faults.WGMMA_UNFENCED, more("fence", "mov.f32 %f11, 0f00000000;")),
    "sums are read too soon": (faults.SUM_TOUCHED, dict(wait_group="")),
    "sums are waited for but not committed": (faults.SUM_TOUCHED, dict(commit="")),
    "the wait leaves one group": (faults.SUM_TOUCHED, part("wait_group", "0;", "1;")),
    "sums are written too soon": (faults.SUM_TOUCHED, more("commit", "mov.f32 %f12, 0f3F800000;")),
    "products are not waited for": (faults.UNFINISHED, dict(wait_group="", store="")),
    "products are waited for but not committed": (faults.UNFINISHED, dict(commit="", store="")),
    "a copy is not waited for": (
        faults.UNFINISHED,
        dict(wait="", **dict.fromkeys(("multiply", "store", "read", "end"), "")),
    ),
    "a second copy is not waited for": (faults.UNFINISHED, dict(read=AGAIN, end="")),
    "more groups are left than are remembered": (
        faults.TOO_MANY,
        dict(commit=17 * PARTS["commit"], **part("wait_group", "0;", "16;")),
    ),
    "sums are not added to": (faults.SCALE, part("zero", "%p11, 0, 0", "%p11, 0, 1")),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_rule_is_broken(what):
    """The kernel as it is breaks none (above)."""
    code, changes = BROKEN[what]
    for seed in SEEDS:
        with pytest.raises(PtxFault) as caught:
            run(seed, **changes)
        assert caught.value.code == code, caught.value


def test_an_mbarrier_is_made_before_others_use_it():
    """Whoever comes too early finds none, and whoever comes in time must know that by a barrier."""
    codes = set()
    for seed in SEEDS:
        with pytest.raises(PtxFault) as caught:
            run(seed, meet="")
        codes.add(caught.value.code)
    assert faults.RACE in codes <= {faults.RACE, faults.MBARRIER_STATE}


def test_an_mbarrier_is_gone_when_all_have_used_it():
    """Whoever comes too late finds none, and whoever came in time must be known by a barrier."""
    codes = set()
    for seed in SEEDS:
        with pytest.raises(PtxFault) as caught:
            run(seed, end="@%p0 mbarrier.inval.shared::cta.b64 [%r11];")
        codes.add(caught.value.code)
    assert faults.RACE in codes <= {faults.RACE, faults.MBARRIER_STATE}


def test_all_who_have_used_an_mbarrier_are_known_before_it_is_gone():
    """Not only the last one: half of the block meets, and the other half has waited as well."""
    end = "setp.lt.u32 %p13, %r0, 64; @!%p13 bra END; bar.sync 1, 64;"
    for seed in SEEDS:
        with pytest.raises(PtxFault) as caught:
            run(seed, end=end + "@%p0 mbarrier.inval.shared::cta.b64 [%r11]; END:")
        assert caught.value.code == faults.RACE


def test_products_are_those_of_a_block_that_is_a_warpgroup():
    with pytest.raises(ValueError, match="must have 128 threads, got 64"):
        run(threads=64)


def test_products_see_ordinary_writes_only_behind_a_proxy_fence():
    write = "cvt.u32.u64 %r15, %rd14; add.s32 %r15, %r15, %r10; " + "".join(
        f"st.shared.u64 [%r15+{2048 * i + 8 * j}], %rd0;" for i in range(4) for j in range(2)
    )
    changes = dict(expect="", copy="", wait="", read="")
    for seed in SEEDS:
        run(seed, **changes, zero=PARTS["zero"] + write + "fence.proxy.async; bar.sync 0;")
        for fence in ("bar.sync 0;", "bar.sync 0; @%p0 fence.proxy.async;", "@%p0 fence.proxy.async; bar.sync 0;"):
            with pytest.raises(PtxFault) as caught:
                run(seed, **changes, zero=PARTS["zero"] + write + fence)
            assert caught.value.code == faults.RACE


def test_copies_see_ordinary_writes_only_behind_a_proxy_fence():
    """What is not there yet comes as NaN."""
    write = "mov.u32 %r16, 1006648320; st.global.b32 [%rd13], %r16;"  # 1 and 0
    for fence, is_seen in (("fence.proxy.async; bar.sync 0;", True), ("bar.sync 0;", False)):
        for seed in SEEDS:
            _, _, sums = run(seed, fence_map=PARTS["fence_map"] + write + fence)
            assert np.isnan(sums).any() != is_seen


def test_a_source_is_not_written_until_its_copy_has_landed():
    """Who writes behind the request races with the copy; who writes behind the wait does not."""
    write = "mov.u32 %r16, 1006648320; st.global.b32 [%rd13], %r16;"
    broken = [run(seed, copy=PARTS["copy"] + "bar.sync 0;" + write)[2] for seed in SEEDS]
    assert any(np.isnan(sums).any() for sums in broken)
    healthy = [run(seed, wait=PARTS["wait"] + write)[2] for seed in SEEDS]
    assert not any(np.isnan(sums).any() for sums in healthy)


def test_a_row_of_a_tall_box_that_nobody_wrote_comes_as_nan():
    rows, missing = 256, 200
    bench = Bench(seed=1)
    room, got = bench.array(rows * ROW_BYTES, np.uint8), bench.array(rows, granule=8)
    room[:] = 1
    bench.arena.wrote(room.ctypes.data, missing * ROW_BYTES)
    bench.arena.wrote(room[(missing + 1) * ROW_BYTES :].ctypes.data, (rows - missing - 1) * ROW_BYTES)
    where = bench.array(NUM_WORDS, granule=8, values=tensor_map(room, rows).words())
    changes = part("names", "%rd14, %r0, 16", "%rd14, %r0, 8") | part("expect", "8192", str(rows * ROW_BYTES))
    changes["read"] = (
        "shl.b32 %r16, %r0, 7; add.s32 %r16, %r16, %r10; add.s64 %rd13, %rd14, GOT;"
        "ld.shared.u64 %rd15, [%r16]; st.global.u64 [%rd13], %rd15;"
        "ld.shared.u64 %rd15, [%r16+16384]; st.global.u64 [%rd13+1024], %rd15;"
    ).replace("GOT", str(got.ctypes.data))
    changes |= dict.fromkeys(("multiply", "commit", "wait_group", "store"), "")
    bench.run(
        "\n".join((PARTS | changes).values()), room, where, shared=SHARED, threads=128, dynamic_bytes=rows * ROW_BYTES
    )
    assert np.flatnonzero(got == -1).tolist() == [missing]
    assert np.flatnonzero(got != 0x0101010101010101).tolist() == [missing]


def test_shared_memory_is_read_before_a_copy_comes_there_again():
    again = "@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r11], 8192;" + PARTS["copy"]
    wait = PARTS["wait"].replace("WAIT", "AGAIN").replace("], 0;", "], 1;")
    for seed in SEEDS:
        run(seed, read=PARTS["read"] + "fence.proxy.async; bar.sync 0;" + again + wait)
    faulty = set()
    for seed in SEEDS:
        with pytest.raises(PtxFault) as caught:
            run(seed, read=PARTS["read"] + again + wait)
        faulty.add(caught.value.code)
    assert faulty == {faults.RACE}


def test_every_rule_has_a_test():
    names = {code: name for name, code in vars(faults).items() if isinstance(code, int) and code in faults.RULES}
    told = "".join(Path(file).read_text(encoding="utf-8") for file in (test_machine.__file__, __file__))
    assert [name for name in names.values() if f"faults.{name}" not in told] == []
