"""Every rule of the machine: a small kernel that breaks it and its healthy twin, under several schedules."""

import traceback

import numpy as np
import pytest
from ptx_kernels import Bench

from flashmoe_numba.ptx import faults, machine
from flashmoe_numba.ptx.faults import PtxFault
from flashmoe_numba.ptx.listing import PtxSyntaxError
from flashmoe_numba.ptx.state import State

SEEDS = range(8)
MINE = "shl.b64 %rd10, %rd4, 3; add.s64 %rd11, %rd10, %rd0; add.s64 %rd12, %rd10, %rd1;"  # this thread's 8 bytes
SHARED = ".shared .align 8 .b8 room[1024];\n"
SLOT = "shl.b32 %r10, %r0, 3; mov.u32 %r11, room; add.s32 %r10, %r10, %r11;"  # this thread's in shared memory


def found(body, seed, options, launch):
    """(code of the fault or None, its text) of one run on 64 words that were written and 64 that were not."""
    bench = Bench(seed=seed, **options)
    written, fresh = bench.array(64, granule=8, values=np.arange(64)), bench.array(64, granule=8)
    try:
        bench.run(body, written, fresh, **launch)
    except PtxFault as fault:
        return fault.code, str(fault)
    return None, ""


def assert_rule(code, broken, healthy, *, options=None, **launch):
    """Some schedule finds that rule broken, none finds another one; the twin is healthy under all."""
    found_codes = {found(broken, seed, options or {}, launch)[0] for seed in SEEDS}
    assert code in found_codes and found_codes <= {code, None}, found_codes
    assert [found(healthy, seed, options or {}, launch)[1] for seed in SEEDS] == [""] * len(SEEDS)


def test_a_fault_keeps_nothing_of_its_launch():
    """Who holds it holds the frames that it went through."""
    bench = Bench()
    with pytest.raises(PtxFault) as caught:
        bench.run("ld.global.u64 %rd10, [%rd0];", 0, 0)
    frames = [frame for frame, _ in traceback.walk_tb(caught.tb)]
    assert not any(isinstance(value, State) for frame in frames for value in frame.f_locals.values())


# single accesses

OUTSIDE = [
    ("ld.global.u64 %rd10, [%rd0+512];", "ld.global.u64 %rd10, [%rd0+504];"),
    ("ld.global.u64 %rd10, [%rd0+-8];", "ld.global.u64 %rd10, [%rd0+0];"),
    ("@%p1 st.global.u64 [%rd1+512], %rd2;", "@%p1 st.global.u64 [%rd1+504], %rd2;"),
    (SLOT + "st.shared.u64 [%r10+776], %rd2;", SLOT + "st.shared.u64 [%r10+768], %rd2;"),
    (SLOT + "mov.u32 %r11, 0; @%p1 st.shared.u64 [%r11], %rd2;", SLOT + "@%p1 st.shared.u64 [%r11], %rd2;"),
]


@pytest.mark.parametrize(("broken", "healthy"), OUTSIDE)
def test_accesses_outside_of_every_allocation(broken, healthy):
    assert_rule(faults.OUT_OF_BOUNDS, broken, healthy, shared=SHARED)


def test_what_was_freed_is_outside():
    bench = Bench()
    array = bench.array(8, values=0)
    bench.run("ld.global.u64 %rd10, [%rd0];", array, array)
    bench.arena.free(array.ctypes.data)
    with pytest.raises(PtxFault, match="outside of every allocation"):
        bench.run("ld.global.u64 %rd10, [%rd0];", array, array)


@pytest.mark.parametrize(("verb", "size"), [("ld", 2), ("ld", 4), ("ld", 8), ("st", 2), ("st", 4), ("st", 8)])
@pytest.mark.parametrize("space", ["global", "shared"])
def test_an_address_is_a_multiple_of_the_access(verb, size, space):
    register = {2: "%rs10", 4: "%r12", 8: "%rd13"}[size]
    base = "%rd0" if space == "global" else "%r11"
    clean = SLOT + "st.shared.u64 [%r10], %rd2; bar.sync 0;"

    def access(offset):
        operands = [register, f"[{base}+{offset}]"]
        return clean + f"@%p1 {verb}.{space}.b{8 * size} {', '.join(operands if verb == 'ld' else operands[::-1])};"

    assert_rule(faults.MISALIGNED, access(size // 2), access(size), shared=SHARED)


def test_a_vector_and_an_atomic_access_are_aligned_too():
    vector = "ld.global.v4.b32 {{%r12, %r13, %r14, %r15}}, [%rd0+{}];"
    assert_rule(faults.MISALIGNED, vector.format(8), vector.format(16))
    atomic = "add.s64 %rd10, %rd0, {}; atom.add.acq_rel.sys.u64 %rd11, [%rd10], 1;"
    assert_rule(faults.MISALIGNED, atomic.format(4), atomic.format(8))


@pytest.mark.parametrize("load", ["ld.global.u64 %rd10, [%rd1];", "ld.acquire.sys.b64 %rd10, [%rd1];"])
def test_what_nobody_wrote_is_not_read(load):
    assert_rule(faults.UNINITIALISED, load, "@%p1 st.global.u64 [%rd1], %rd2; bar.sync 0;" + load)


def test_shared_memory_is_fresh_at_every_launch():
    write, read = SLOT + "st.shared.u64 [%r10], %rd2;", SLOT + "ld.shared.u64 %rd10, [%r10];"
    assert_rule(faults.UNINITIALISED, read, write + read, shared=SHARED)
    bench = Bench()
    bench.run(write, 0, 0, shared=SHARED)
    with pytest.raises(PtxFault, match="nobody has written"):
        bench.run(read, 0, 0, shared=SHARED)


def test_a_generic_address_of_shared_memory_is_not_global():
    at = SLOT + "st.shared.u64 [%r10], %rd2; bar.sync 0; mov.u64 %rd10, room; cvta.shared.u64 %rd11, %rd10;"
    assert_rule(faults.WRONG_SPACE, at + "ld.global.u64 %rd12, [%rd11];", at + "ld.u64 %rd12, [%rd11];", shared=SHARED)


@pytest.mark.parametrize("name", ["div.s64", "div.u64", "rem.s64", "rem.u64"])
def test_nothing_is_divided_by_zero(name):
    assert_rule(faults.DIVISION, f"{name} %rd10, %rd0, %rd2;", f"add.s64 %rd11, %rd2, 1; {name} %rd10, %rd0, %rd11;")


def test_nothing_narrow_is_divided_by_zero():
    for name, family in (("div.u32", "r"), ("rem.u32", "r"), ("div.u16", "rs")):
        one = "add.s16 %rs11, %rs10, 1;" if family == "rs" else "add.s32 %r11, %r0, 1; mov.u32 %r10, %r0;"
        first = "cvt.u16.u32 %rs10, %r0;" + one if family == "rs" else one
        divide = f"{name} %{family}12, %{family}11, %{family}"
        assert_rule(faults.DIVISION, first + divide + "10;", first + divide + "11;")


# order between threads


def test_threads_of_a_block_meet_before_they_read_each_others_shared_memory():
    write = SLOT + "st.shared.u64 [%r10], %rd2;"
    reverse = "mov.u32 %r13, 63; sub.s32 %r13, %r13, %r0; shl.b32 %r13, %r13, 3; add.s32 %r13, %r13, %r11;"
    read = reverse + "ld.shared.u64 %rd10, [%r13];"
    own = SLOT + "ld.shared.u64 %rd10, [%r10];"
    assert_rule(faults.RACE, write + "bar.sync 0; bar.sync 0; st.shared.u64 [%r10], %rd3;" + read,
                write + "bar.sync 0;" + read + "bar.sync 0;" + own, threads=64, shared=SHARED)  # fmt: skip


def test_a_read_before_anothers_write_is_a_race_as_well():
    write = SLOT + "st.shared.u64 [%r10], %rd2; bar.sync 0; ld.shared.u64 %rd10, [%r11];"
    again = "@%p0 st.shared.u64 [%r11], %rd3;"
    assert_rule(faults.RACE, write + again, write + "bar.sync 0;" + again, threads=64, shared=SHARED)


def test_blocks_do_not_write_the_same_word_of_global_memory():
    assert_rule(faults.RACE, "@%p0 st.global.u64 [%rd1], %rd2;", "@%p1 st.global.u64 [%rd1], %rd2;", blocks=2)
    assert_rule(faults.RACE, MINE + "@%p0 st.global.u64 [%rd0], %rd2; @!%p0 ld.global.u64 %rd13, [%rd0];",
                MINE + "st.global.u64 [%rd11], %rd2; ld.global.u64 %rd13, [%rd11];", blocks=2)  # fmt: skip


MESSAGE = """
@!%p2 bra LOOK;
@%p0 st.global.u64 [%rd1], 77;
@%p0 {send};
bra END;
LOOK:
@!%p0 bra END;
{look};
setp.ne.s64 %p10, %rd13, {wanted};
@%p10 bra LOOK;
ld.global.u64 %rd14, [%rd1];
st.global.u64 [%rd0+8], %rd14;
END:
"""
SENDS = {
    "st": "st.{}.{}.b64 [%rd0], 5",
    "add": "atom.add.{}.{}.u64 %rd12, [%rd0], 5",
    "cas": "atom.cas.{}.{}.b64 %rd12, [%rd0], 0, 5",
}
LOOKS = {"ld": "ld.{}.{}.b64 %rd13, [%rd0]", "cas": "atom.cas.{}.{}.b64 %rd13, [%rd0], -1, 0"}


def message(send="st", look="ld", send_order="release", look_order="acquire", send_scope="gpu", look_scope="gpu"):
    """One block writes 77 and tells the other, which reads it."""
    return MESSAGE.format(
        send=SENDS[send].format(send_order, send_scope), look=LOOKS[look].format(look_order, look_scope), wanted=5
    )


def test_a_message_needs_release_and_acquire():
    options = dict(blocks=2, threads=32)
    assert_rule(faults.RACE, message(send_order="relaxed"), message(), **options)
    assert_rule(faults.RACE, message(look_order="relaxed"), message(), **options)
    for send in ("add", "cas"):
        for order, healthy in (("relaxed", "release"), ("acquire", "acq_rel")):
            assert_rule(faults.RACE, message(send, send_order=order), message(send, send_order=healthy), **options)
    for order, healthy in (("relaxed", "acquire"), ("release", "acq_rel")):
        assert_rule(
            faults.RACE, message("st", "cas", look_order=order), message("st", "cas", look_order=healthy), **options
        )


def test_a_message_arrives():
    for seed in SEEDS:
        bench = Bench(seed=seed)
        words, data = bench.array(64, granule=8, values=0), bench.array(64, granule=8)
        bench.run(message(), words, data, blocks=2)
        assert words[:2].tolist() == [5, 77]


def test_an_atomic_access_in_between_hands_on_what_was_released():
    """8.9.2: a write precedes what reads the atomic operation that read it."""
    body = """
    setp.eq.s32 %p11, %r1, 1;
    @!%p0 bra END;
    @%p11 bra ADD;
    @!%p2 bra LOOK;
    st.global.u64 [%rd1], 77;
    {};
    bra END;
    ADD:
    ld.relaxed.gpu.b64 %rd13, [%rd0];
    setp.ne.s64 %p10, %rd13, 5;
    @%p10 bra ADD;
    atom.add.relaxed.gpu.u64 %rd13, [%rd0], 1;
    bra END;
    LOOK:
    ld.acquire.gpu.b64 %rd13, [%rd0];
    setp.ne.s64 %p10, %rd13, 6;
    @%p10 bra LOOK;
    ld.global.u64 %rd14, [%rd1];
    END:
    """
    broken, healthy = (body.format(f"st.{order}.gpu.b64 [%rd0], 5") for order in ("relaxed", "release"))
    assert_rule(faults.RACE, broken, healthy, blocks=3)


def test_a_wider_operation_in_between_does_not_widen_a_release():
    """8.9.4: the release and the acquire must be morally strong themselves. The last block is another GPU's."""
    body = """
    add.s64 %rd17, %rd0, 16;
    setp.eq.s32 %p11, %r1, 1;
    @!%p0 bra END;
    @%p11 bra ADD;
    @!%p2 bra LOOK;
    st.global.u64 [%rd1], 77;
    st.release.{}.b64 [%rd0], 5;
    bra END;
    ADD:
    ld.relaxed.gpu.b64 %rd13, [%rd0];
    setp.ne.s64 %p10, %rd13, 5;
    @%p10 bra ADD;
    atom.add.relaxed.sys.u64 %rd13, [%rd0], 1;
    st.relaxed.sys.b64 [%rd17], 1;
    bra END;
    LOOK:
    ld.relaxed.sys.b64 %rd13, [%rd17];
    setp.ne.s64 %p10, %rd13, 1;
    @%p10 bra LOOK;
    AGAIN:
    ld.acquire.sys.b64 %rd13, [%rd0];
    setp.ne.s64 %p10, %rd13, 6;
    @%p10 bra AGAIN;
    ld.global.u64 %rd14, [%rd1];
    END:
    """
    assert_rule(faults.RACE, body.format("gpu"), body.format("sys"), options=dict(blocks_per_gpu=2), blocks=3)


def test_a_relaxed_store_behind_the_same_threads_release_hands_it_on():
    """8.8, release patterns, 2: what lies between the two is not released."""
    again = "st.{}.gpu.b64 [%rd0], 4; @%p0 st.relaxed.gpu.b64 [%rd0], 5"
    wait = "ld.relaxed.gpu.b64 %rd13, [%rd0]; setp.ne.s64 %p10, %rd13, 5; @%p10 bra LOOK;"
    body = MESSAGE.format(send=again, look=wait + LOOKS["ld"].format("acquire", "gpu"), wanted=5)
    healthy = body.format("release")
    assert_rule(faults.RACE, body.format("relaxed"), healthy, blocks=2)
    data = "@%p0 st.global.u64 [%rd1], 77;"
    between = healthy.replace(data, "").replace("4; @%p0", "4; " + data + "@%p0")
    assert_rule(faults.RACE, between, healthy, blocks=2)


def test_scopes_must_hold_the_other_thread():
    for one_gpu_each, good, bad in ((None, "gpu", "cta"), (1, "sys", "gpu"), (1, "sys", "cta")):
        options = dict(options=dict(blocks_per_gpu=one_gpu_each), blocks=2)
        healthy = message(send_scope=good, look_scope=good)
        for broken in (message(send_scope=bad, look_scope=good), message(send_scope=good, look_scope=bad)):
            assert_rule(faults.SCOPE, broken, healthy, **options)


LATER = """
add.s64 %rd17, %rd0, 16;
@!%p0 bra END;
@!%p2 bra LOOK;
{}
st.relaxed.gpu.b64 [%rd17], 1;
bra END;
LOOK:
ld.relaxed.gpu.b64 %rd15, [%rd17];
setp.ne.s64 %p10, %rd15, 1;
@%p10 bra LOOK;
{}
END:
"""  # one block does something, and then the other does, without any order between the two


@pytest.mark.parametrize("mine", ["st.global.u64 [%rd0], 3;", "ld.global.u64 %rd13, [%rd0];"])
@pytest.mark.parametrize("again", ["st.relaxed.gpu.b64 [%rd0], 5;", "atom.add.relaxed.gpu.u64 %rd12, [%rd0], 5;"])
@pytest.mark.parametrize("others", ["st.relaxed.gpu.b64 [%rd0], 7;", "atom.add.acq_rel.gpu.u64 %rd13, [%rd0], 1;"])
def test_an_atomic_access_does_not_hide_the_same_threads_ordinary_one(mine, again, others):
    body = LATER.format("{} " + again, others)
    assert_rule(faults.RACE, body.format(mine), body.format(""), blocks=2)


def test_an_atomic_read_does_not_hide_the_same_threads_ordinary_one():
    body = LATER.format("{} ld.relaxed.gpu.b64 %rd13, [%rd0];", "{}")
    atomic = "st.relaxed.gpu.b64 [%rd0], 7;"
    ordinary = "ld.global.u64 %rd12, [%rd0];"
    assert_rule(faults.RACE, body.format(ordinary, atomic), body.format("", atomic), blocks=2)
    assert_rule(faults.RACE, body.format("", "st.global.u64 [%rd0], 7;"), body.format(ordinary, ordinary), blocks=2)


def test_an_ordinary_access_before_atomic_ones_is_ordered_as_any_other():
    """The other thread has it behind the first message, and sends atomic ones itself."""
    body = "add.s64 %rd17, %rd0, 16;" + message()
    body = body.replace("@%p0 st.global", "@%p0 st.global.u64 [%rd0+16], 3; @%p0 st.global")
    body = body.replace("@%p0 st.release", "@%p0 st.relaxed.gpu.b64 [%rd17], 4; @%p0 st.release")
    healthy = body.replace("END:\n", "atom.add.relaxed.gpu.u64 %rd15, [%rd17], 1; END:\n")
    early = body.replace("LOOK:\n", "LOOK:\n@%p0 atom.add.relaxed.gpu.u64 %rd15, [%rd17], 1;\n", 1)
    assert_rule(faults.RACE, early, healthy, blocks=2)


def test_many_add_to_one_word():
    bench = Bench(seed=3)
    words = bench.array(64, granule=8, values=0)
    bench.run("atom.add.acq_rel.gpu.u64 %rd10, [%rd0], 2;", words, words, blocks=3, threads=64)
    assert words[0] == 2 * 3 * 64


# barriers and time


def test_a_warp_comes_to_one_barrier_instruction():
    body = "setp.lt.s32 %p10, %r0, {}; @%p10 bra A; bar.sync 0; bra B; A: bar.sync 0; B:"
    assert_rule(faults.BARRIER_DIVERGED, body.format(7), body.format(32), threads=64)


def test_threads_of_a_barrier_are_whole_warps():
    for bad in (33, 128):
        assert_rule(faults.BARRIER_COUNT, f"bar.sync 1, {bad};", "bar.sync 1, 64;", threads=64)


@pytest.mark.parametrize("number", [16, -1])
def test_a_barrier_is_one_of_sixteen(number):
    with pytest.raises(PtxSyntaxError, match=rf"a barrier that is not in \[0, 16\): bar.sync {number}"):
        found(f"bar.sync {number};", 0, {}, {})


def test_a_barrier_that_not_all_reach():
    body = "setp.lt.s32 %p10, %r0, 32; @%p10 bar.sync {};"
    assert_rule(faults.DEADLOCK, body.format("0"), body.format("1, 32"), threads=64)
    code, text = found(body.format("0"), 0, {}, dict(threads=64))
    assert code == faults.DEADLOCK and "32 threads of block 0 wait at PTX line" in text and "bar.sync 0" in text


def test_a_kernel_ends():
    loop = "mov.u32 %r10, 0; L: add.s32 %r10, %r10, {}; setp.lt.s32 %p10, %r10, 10; @%p10 bra L;"
    assert_rule(faults.STEP_LIMIT, loop.format(0), loop.format(1))


def test_time_passes_while_all_sleep():
    bench = Bench()
    made = bench.array(2, granule=8)
    timer = "mov.u64 %rd1{}, %globaltimer;"
    bench.run(
        timer.format(0)
        + "nanosleep.u32 5000;"
        + timer.format(1)
        + "st.global.u64 [%rd0], %rd10; st.global.u64 [%rd0+8], %rd11;",
        made,
        made,
        threads=1,
    )
    assert 5000 <= made[1] - made[0] < 5100


def test_a_compilation_is_told(tmp_path, capsys):
    """And not that the code was found, which is all that happens after it."""
    from numba import njit, types

    function = njit(lambda x: x + 1)
    cache = machine._TellingCache(function.py_func, "sources", tmp_path)
    told = []
    for _ in range(2):
        again = njit(function.py_func)
        again._cache = cache
        again.compile((types.int64,))
        told.append(capsys.readouterr().err)
    assert told == ["flashmoe: compiling the PTX machine (about a minute; kept afterwards)\n", ""]


def test_the_same_seed_is_the_same_schedule():
    def steps(seed):
        bench = Bench(seed=seed)
        words = bench.array(64, granule=8, values=0)
        bench.run(message(), words, bench.array(64, granule=8), blocks=2, threads=32)
        return bench.machine.steps

    assert [steps(seed) for seed in SEEDS] == [steps(seed) for seed in SEEDS]
    assert len({steps(seed) for seed in SEEDS}) > 1
