"""What a profile counts, on kernels whose accesses can be counted by hand."""

import pytest
from ptx_kernels import QUEUE_BYTES, Bench, Counting

from flashmoe_numba.ptx import in_step
from flashmoe_numba.ptx.in_step import FIRST_KIND, NUM_ACTIVITIES, OS_BLOCK, WAITING
from reference import COMBINE, GEMM0

pytestmark = pytest.mark.timeout(600)  # the first run compiles the machine
ROOM = ".shared .align 8 .b8 room[32768];\n"


def count(body, *arrays, **how):
    bench = Bench()
    bench.machine = Counting(arena=bench.arena, most_steps=200_000)
    arrays = [bench.array(QUEUE_BYTES // 8, values=0), *(bench.array(n, values=0) for n in arrays)]
    bench.run(body, *arrays, 0, shared=ROOM, **how)
    return bench.machine


def accesses(machine):
    """Global requests, sectors and bytes, and sectors too many."""
    counters = [in_step.GLOBAL_REQUESTS, in_step.GLOBAL_SECTORS, in_step.GLOBAL_BYTES]
    return [*machine.profile.counts.sum(axis=0)[counters].tolist(), int(machine.profile.steps[:, in_step.EXCESS].sum())]


@pytest.mark.parametrize(("shift", "bits", "expected"), [
    (2, 32, [1, 4, 128, 0]),  # side by side
    (3, 32, [1, 8, 128, 4]),  # every other word
    (7, 32, [1, 32, 128, 28]),  # a line each
    (64, 32, [1, 1, 4, 0]),  # all the same
    (3, 64, [1, 8, 256, 0]),
])  # fmt: skip
def test_sectors_of_an_access(shift, bits, expected):
    body = f"shl.b64 %rd10, %rd2, {shift}; add.s64 %rd10, %rd10, %rd1; ld.global.u{bits} %rd11, [%rd10];"
    assert accesses(count(body, 1024)) == expected


@pytest.mark.parametrize(("step", "bits", "turns"), [(4, 32, 1), (8, 32, 2), (128, 32, 32), (132, 32, 1), (0, 32, 1),
                                                     (8, 64, 2), (16, 64, 4)])  # fmt: skip
def test_turns_of_a_bank(step, bits, turns):
    address = f"mov.u64 %rd10, room; mad.lo.s64 %rd10, %rd2, {step}, %rd10;"
    same = "@%p0 " if step == 0 else ""  # else all would write it
    stored = count(f"{address} {same}st.shared.u{bits} [%rd10], %rd2;").profile.counts.sum(axis=0)
    assert stored[[in_step.SHARED_REQUESTS, in_step.SHARED_TURNS]].tolist() == [1, turns]


def test_threads_that_part_ways_meet_again():
    """First one thread, then all others, then all together; every step of a thread is counted once."""
    body = "@%p0 bra ONE; add.s64 %rd10, %rd2, 1; bra BOTH; ONE: add.s64 %rd10, %rd2, 2; BOTH: add.s64 %rd11, %rd10, 1;"
    machine = count(body, threads=64)
    counts = machine.profile.counts[WAITING]
    assert counts[in_step.THREAD_STEPS] == machine.steps
    parted = 1 + 2 + 1 + 1 + 2 + 2  # bra, (one, add and bra), add; bra, add and bra
    whole = (counts[in_step.WARP_STEPS] - parted) / 2  # of either warp
    assert whole == int(whole)
    program = next(iter(machine._programs.values()))
    last = [i for i in range(len(program.code)) if "%rd11" in program.instruction(i).text]
    assert next(iter(machine.executed.values()))[last].tolist() == [64]


def test_work_is_counted_by_the_task_that_a_block_is_at():
    body = f"""
        mov.u64 %rd10, {GEMM0}; mov.u64 %rd11, {COMBINE};
        @%p1 st.global.u64 [%rd0+72], %rd10;
        @%p1 st.global.u64 [%rd0+136], %rd11;
        bar.sync 0;
        @!%p2 bra END;
        ld.global.u64 %rd12, [%rd0+72];
        bar.sync 0; bar.sync 0;
        ld.global.u64 %rd12, [%rd0+136];
        bar.sync 0;
        ld.acquire.sys.b64 %rd12, [%rd0];
        bar.sync 0;
        END: bar.sync 0;
    """
    counts = count(body, blocks=2).profile.counts
    barriers = {i: int(n) for i, n in enumerate(counts[:, in_step.BARRIERS]) if n}
    assert barriers == {WAITING: 1 + 1 + 1, OS_BLOCK: 2, FIRST_KIND + GEMM0: 2, FIRST_KIND + COMBINE: 1}
    assert counts[:, in_step.ATOMICS].tolist() == [32 if i == WAITING else 0 for i in range(NUM_ACTIVITIES)]
