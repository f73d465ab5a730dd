"""One thread runs until it waits, ends, or has had its slice. The codes are those of opcodes.py.

Numba turns the chain of comparisons into a jump by the code's number.
"""

from __future__ import annotations

import math

import numpy as np

from ..device.cpu import from_half, to_half
from . import copies, endings, faults, mbarriers, products, state
from . import opcodes as op
from .arithmetic import exp2_approximate, fused, fused_down, larger, saturated, smaller, to_bfloat
from .compiled import njit
from .order import access_word, arrive, now_ns
from .program import CODE, NUMBER, ROW, SHARED_WINDOW, TARGET, A, B, C
from .typed import f32, f64, i16, i32, i64, put, u16, u32, u64
from .watch import GENERIC_PROXY, NOWHERE, fault, locate, plain, watch_read, watch_write


@njit
def load(S, thread, step, address, space, num_bytes):
    """Offset in the arena of bytes that an ordinary load reads, or NOWHERE."""
    at = locate(S, thread, step, address, space, num_bytes)
    if at != NOWHERE and not watch_read(S, thread, step, at, num_bytes, plain(S, thread)):
        return NOWHERE
    return at


@njit
def store(S, thread, step, address, space, num_bytes):
    at = locate(S, thread, step, address, space, num_bytes)
    if at != NOWHERE and not watch_write(S, thread, step, at, num_bytes, plain(S, thread), GENERIC_PROXY):
        return NOWHERE
    return at


@njit
def bit(condition):
    return 1 if condition else 0


@njit
def run_thread(S, thread, most):
    """Run at most so many steps."""
    code, r, executed = S.code, S.r, S.executed
    base = thread * S.s[state.SLOTS]
    pc = S.threads[thread].pc
    steps = 0
    while steps < most:
        step = pc
        row = step * ROW
        what = i32(code, row + CODE)
        target, ia = base + i32(code, row + TARGET), base + i32(code, row + A)
        ib, ic = base + i32(code, row + B), base + i32(code, row + C)
        put(executed, step, i64(executed, step) + 1)
        steps += 1
        pc += 1
        # integers
        if what == op.ADD64:
            put(r, target, i64(r, ia) + i64(r, ib))
        elif what == op.SUB64:
            put(r, target, i64(r, ia) - i64(r, ib))
        elif what == op.MUL64:
            put(r, target, i64(r, ia) * i64(r, ib))
        elif what == op.MAD64:
            put(r, target, i64(r, ia) * i64(r, ib) + i64(r, ic))
        elif what == op.NEG64:
            put(r, target, -i64(r, ia))
        elif what == op.DIV_S64:
            if i64(r, ib) == 0:
                fault(S, faults.DIVISION, thread, step, 0)
                break
            quotient = np.int64(np.uint64(abs(i64(r, ia))) // np.uint64(abs(i64(r, ib))))  # abs(-2**63) is -2**63
            put(r, target, -quotient if (i64(r, ia) < 0) != (i64(r, ib) < 0) else quotient)
        elif what == op.REM_S64:
            if i64(r, ib) == 0:
                fault(S, faults.DIVISION, thread, step, 0)
                break
            rest = np.int64(np.uint64(abs(i64(r, ia))) % np.uint64(abs(i64(r, ib))))
            put(r, target, -rest if i64(r, ia) < 0 else rest)
        elif what == op.DIV_U64 or what == op.REM_U64:
            if u64(r, ib) == 0:
                fault(S, faults.DIVISION, thread, step, 0)
                break
            put(r, target, np.uint64(u64(r, ia) // u64(r, ib) if what == op.DIV_U64 else u64(r, ia) % u64(r, ib)))
        elif what == op.MIN_S64:
            put(r, target, min(i64(r, ia), i64(r, ib)))
        elif what == op.MAX_S64:
            put(r, target, max(i64(r, ia), i64(r, ib)))
        elif what == op.MIN_U64:
            put(r, target, np.uint64(min(u64(r, ia), u64(r, ib))))
        elif what == op.MAX_U64:
            put(r, target, np.uint64(max(u64(r, ia), u64(r, ib))))
        elif what == op.ADD32:
            put(r, target, np.uint32(u32(r, ia) + u32(r, ib)))
        elif what == op.SUB32:
            put(r, target, np.int32(i32(r, ia) - i32(r, ib)))
        elif what == op.MUL32:
            put(r, target, np.int32(np.int64(i32(r, ia)) * np.int64(i32(r, ib))))
        elif what == op.MAD32:
            put(r, target, np.int32(np.int64(i32(r, ia)) * np.int64(i32(r, ib)) + i32(r, ic)))
        elif what == op.DIV_U32 or what == op.REM_U32:
            if u32(r, ib) == 0:
                fault(S, faults.DIVISION, thread, step, 0)
                break
            put(r, target, np.uint32(u32(r, ia) // u32(r, ib) if what == op.DIV_U32 else u32(r, ia) % u32(r, ib)))
        elif what == op.MUL_WIDE_S32:
            put(r, target, np.int64(i32(r, ia)) * np.int64(i32(r, ib)))
        elif what == op.MUL_WIDE_U32:
            put(r, target, np.int64(u32(r, ia)) * np.int64(u32(r, ib)))
        elif what == op.ADD16:
            put(r, target, np.uint16(np.int64(u16(r, ia)) + np.int64(u16(r, ib))))
        elif what == op.DIV_U16:
            if u16(r, ib) == 0:
                fault(S, faults.DIVISION, thread, step, 0)
                break
            put(r, target, np.uint16(u16(r, ia) // u16(r, ib)))
        elif what == op.AND or what == op.AND_PRED:
            put(r, target, i64(r, ia) & i64(r, ib))
        elif what == op.OR or what == op.OR_PRED:
            put(r, target, i64(r, ia) | i64(r, ib))
        elif what == op.XOR or what == op.XOR_PRED:
            put(r, target, i64(r, ia) ^ i64(r, ib))
        elif what == op.NOT64:
            put(r, target, ~i64(r, ia))
        elif what == op.NOT_PRED:
            put(r, target, 1 - i64(r, ia))
        # shifts by more than the width give zeros, or the sign (9.7.8.8, 9.7.8.9)
        elif what == op.SHL64:
            put(r, target, i64(r, ia) << np.int64(u32(r, ib)) if u32(r, ib) < 64 else 0)
        elif what == op.SHR_S64:
            put(r, target, i64(r, ia) >> np.int64(min(u32(r, ib), np.uint32(63))))
        elif what == op.SHR_U64:
            put(r, target, np.uint64(u64(r, ia) >> np.uint64(u32(r, ib)) if u32(r, ib) < 64 else np.uint64(0)))
        elif what == op.SHL32:
            put(r, target, np.uint32(np.int64(u32(r, ia)) << np.int64(u32(r, ib)) if u32(r, ib) < 32 else 0))
        elif what == op.SHR_S32:
            put(r, target, np.int32(np.int64(i32(r, ia)) >> np.int64(min(u32(r, ib), np.uint32(31)))))
        elif what == op.SHR_U32:
            put(r, target, np.uint32(np.int64(u32(r, ia)) >> np.int64(u32(r, ib)) if u32(r, ib) < 32 else 0))
        # comparisons
        elif what == op.EQ64:
            put(r, target, bit(i64(r, ia) == i64(r, ib)))
        elif what == op.NE64:
            put(r, target, bit(i64(r, ia) != i64(r, ib)))
        elif what == op.LT_S64:
            put(r, target, bit(i64(r, ia) < i64(r, ib)))
        elif what == op.LE_S64:
            put(r, target, bit(i64(r, ia) <= i64(r, ib)))
        elif what == op.LT_U64:
            put(r, target, bit(u64(r, ia) < u64(r, ib)))
        elif what == op.LE_U64:
            put(r, target, bit(u64(r, ia) <= u64(r, ib)))
        elif what == op.EQ32:
            put(r, target, bit(i32(r, ia) == i32(r, ib)))
        elif what == op.NE32:
            put(r, target, bit(i32(r, ia) != i32(r, ib)))
        elif what == op.LT_S32:
            put(r, target, bit(i32(r, ia) < i32(r, ib)))
        elif what == op.LE_S32:
            put(r, target, bit(i32(r, ia) <= i32(r, ib)))
        elif what == op.LT_U32:
            put(r, target, bit(u32(r, ia) < u32(r, ib)))
        elif what == op.LE_U32:
            put(r, target, bit(u32(r, ia) <= u32(r, ib)))
        elif what == op.EQ16:
            put(r, target, bit(i16(r, ia) == i16(r, ib)))
        elif what == op.NE16:
            put(r, target, bit(i16(r, ia) != i16(r, ib)))
        elif what == op.LT_S16:
            put(r, target, bit(i16(r, ia) < i16(r, ib)))
        elif what == op.LE_S16:
            put(r, target, bit(i16(r, ia) <= i16(r, ib)))
        elif what == op.EQ_F32:
            put(r, target, bit(f32(r, ia) == f32(r, ib)))
        elif what == op.EQU_F32:
            put(r, target, bit(not (f32(r, ia) < f32(r, ib) or f32(r, ia) > f32(r, ib))))  # of a NaN, too
        elif what == op.NE_F32:
            put(r, target, bit(f32(r, ia) < f32(r, ib) or f32(r, ia) > f32(r, ib)))  # of a NaN not
        elif what == op.NEU_F32:
            put(r, target, bit(f32(r, ia) != f32(r, ib)))  # of a NaN, too
        elif what == op.LT_F32:
            put(r, target, bit(f32(r, ia) < f32(r, ib)))
        elif what == op.LE_F32:
            put(r, target, bit(f32(r, ia) <= f32(r, ib)))
        elif what == op.LTU_F32:
            put(r, target, bit(not f32(r, ia) >= f32(r, ib)))
        elif what == op.LEU_F32:
            put(r, target, bit(not f32(r, ia) > f32(r, ib)))
        elif what == op.NAN_F32:
            put(r, target, bit(math.isnan(f32(r, ia)) or math.isnan(f32(r, ib))))
        elif what == op.NUM_F32:
            put(r, target, bit(not (math.isnan(f32(r, ia)) or math.isnan(f32(r, ib)))))
        elif what == op.EQ_F64:
            put(r, target, bit(f64(r, ia) == f64(r, ib)))
        elif what == op.EQU_F64:
            put(r, target, bit(not (f64(r, ia) < f64(r, ib) or f64(r, ia) > f64(r, ib))))  # of a NaN, too
        elif what == op.NE_F64:
            put(r, target, bit(f64(r, ia) < f64(r, ib) or f64(r, ia) > f64(r, ib)))  # of a NaN not
        elif what == op.NEU_F64:
            put(r, target, bit(f64(r, ia) != f64(r, ib)))  # of a NaN, too
        elif what == op.LT_F64:
            put(r, target, bit(f64(r, ia) < f64(r, ib)))
        elif what == op.LE_F64:
            put(r, target, bit(f64(r, ia) <= f64(r, ib)))
        elif what == op.LTU_F64:
            put(r, target, bit(not f64(r, ia) >= f64(r, ib)))
        elif what == op.LEU_F64:
            put(r, target, bit(not f64(r, ia) > f64(r, ib)))
        elif what == op.NAN_F64:
            put(r, target, bit(math.isnan(f64(r, ia)) or math.isnan(f64(r, ib))))
        elif what == op.NUM_F64:
            put(r, target, bit(not (math.isnan(f64(r, ia)) or math.isnan(f64(r, ib)))))
        elif what == op.SELECT:
            put(r, target, i64(r, ia) if i64(r, ic) != 0 else i64(r, ib))
        # floating point
        elif what == op.ADD_F32:
            put(r, target, np.float32(f32(r, ia) + f32(r, ib)))
        elif what == op.SUB_F32:
            put(r, target, np.float32(f32(r, ia) - f32(r, ib)))
        elif what == op.MUL_F32:
            put(r, target, np.float32(f32(r, ia) * f32(r, ib)))
        elif what == op.FMA_F32:
            put(r, target, np.float32(fused(f32(r, ia), f32(r, ib), f32(r, ic))))
        elif what == op.FMA_DOWN_F32:
            put(r, target, np.float32(fused_down(f32(r, ia), f32(r, ib), f32(r, ic))))
        elif what == op.NEG_F32:
            put(r, target, np.float32(-f32(r, ia)))
        elif what == op.ABS_F32:
            put(r, target, np.float32(abs(f32(r, ia))))
        elif what == op.MIN_F32:
            put(r, target, np.float32(smaller(f32(r, ia), f32(r, ib))))
        elif what == op.MAX_F32:
            put(r, target, np.float32(larger(f32(r, ia), f32(r, ib))))
        elif what == op.DIV_F32:
            put(r, target, np.float32(f32(r, ia) / f32(r, ib)))
        elif what == op.RCP_F32:
            put(r, target, np.float32(np.float32(1) / f32(r, ia)))
        elif what == op.SQRT_F32:
            put(r, target, np.float32(math.sqrt(f32(r, ia))))
        elif what == op.EX2_F32:
            put(r, target, np.float32(exp2_approximate(f32(r, ia))))
        elif what == op.SATURATE_F32:
            put(r, target, np.float32(saturated(f32(r, ia))))
        elif what == op.ADD_F64:
            put(r, target, np.float64(f64(r, ia) + f64(r, ib)))
        elif what == op.SUB_F64:
            put(r, target, np.float64(f64(r, ia) - f64(r, ib)))
        elif what == op.MUL_F64:
            put(r, target, np.float64(f64(r, ia) * f64(r, ib)))
        elif what == op.FMA_F64:
            put(r, target, np.float64(fused(f64(r, ia), f64(r, ib), f64(r, ic))))
        elif what == op.NEG_F64:
            put(r, target, np.float64(-f64(r, ia)))
        elif what == op.ABS_F64:
            put(r, target, np.float64(abs(f64(r, ia))))
        elif what == op.MIN_F64:
            put(r, target, np.float64(smaller(f64(r, ia), f64(r, ib))))
        elif what == op.MAX_F64:
            put(r, target, np.float64(larger(f64(r, ia), f64(r, ib))))
        elif what == op.DIV_F64:
            put(r, target, np.float64(f64(r, ia) / f64(r, ib)))
        elif what == op.RCP_F64:
            put(r, target, np.float64(1.0 / f64(r, ia)))
        elif what == op.SQRT_F64:
            put(r, target, np.float64(math.sqrt(f64(r, ia))))
        # movement and conversion
        elif what == op.MOVE:
            put(r, target, i64(r, ia))
        elif what == op.PACK64:
            put(r, target, np.int64(u32(r, ia)) | np.int64(u32(r, ib)) << 32)
        elif what == op.ZERO_EXTEND32:
            put(r, target, np.int64(u32(r, ia)))
        elif what == op.SIGN_EXTEND32:
            put(r, target, np.int64(i32(r, ia)))
        elif what == op.ZERO_EXTEND16:
            put(r, target, np.int64(u16(r, ia)))
        elif what == op.F32_OF_F16:
            put(r, target, np.float32(from_half(u16(r, ia))))
        elif what == op.F16_OF_F32:
            put(r, target, np.uint16(to_half(f32(r, ia))))
        elif what == op.BF16_OF_F32:
            put(r, target, np.uint16(to_bfloat(np.int64(u32(r, ia)))))
        elif what == op.TO_SHARED:
            put(r, target, i64(r, ia) - SHARED_WINDOW)
        elif what == op.FROM_SHARED:
            put(r, target, i64(r, ia) + SHARED_WINDOW)
        elif what == op.LOAD16:
            at = load(S, thread, step, i64(r, ia) + i32(code, row + NUMBER), i32(code, row + C), 2)
            if at == NOWHERE:
                break
            put(r, target, np.int64(u16(S.m, at)))
        elif what == op.LOAD32:
            at = load(S, thread, step, i64(r, ia) + i32(code, row + NUMBER), i32(code, row + C), 4)
            if at == NOWHERE:
                break
            put(r, target, np.int64(u32(S.m, at)))
        elif what == op.LOAD64:
            at = load(S, thread, step, i64(r, ia) + i32(code, row + NUMBER), i32(code, row + C), 8)
            if at == NOWHERE:
                break
            put(r, target, i64(S.m, at))
        elif what == op.LOAD128:
            at = load(S, thread, step, i64(r, ia) + i32(code, row + NUMBER), i32(code, row + C), 16)
            if at == NOWHERE:
                break
            for i in range(4):
                put(r, target + i, np.int64(u32(S.m, at + 4 * i)))
        elif what == op.STORE16:
            at = store(S, thread, step, i64(r, ia) + i32(code, row + NUMBER), i32(code, row + C), 2)
            if at == NOWHERE:
                break
            put(S.m, at, u16(r, ib))
        elif what == op.STORE32:
            at = store(S, thread, step, i64(r, ia) + i32(code, row + NUMBER), i32(code, row + C), 4)
            if at == NOWHERE:
                break
            put(S.m, at, u32(r, ib))
        elif what == op.STORE64:
            at = store(S, thread, step, i64(r, ia) + i32(code, row + NUMBER), i32(code, row + C), 8)
            if at == NOWHERE:
                break
            put(S.m, at, i64(r, ib))
        elif what == op.STORE128:
            at = store(S, thread, step, i64(r, ia) + i32(code, row + NUMBER), i32(code, row + C), 16)
            if at == NOWHERE:
                break
            for i in range(4):
                put(S.m, at + 4 * i, u32(r, ib + i))
        # control flow
        elif what == op.BRANCH:
            pc = np.int64(i32(code, row + NUMBER))
        elif what == op.BRANCH_IF:
            if i64(r, ia) != 0:
                pc = np.int64(i32(code, row + NUMBER))
        elif what == op.BRANCH_UNLESS:
            if i64(r, ia) == 0:
                pc = np.int64(i32(code, row + NUMBER))
        elif what == op.TIMER:
            put(r, target, now_ns(S))
        else:
            S.threads[thread].pc = pc
            S.s[state.STEPS] += steps
            meet(S, thread, step, what, base)
            return
    S.threads[thread].pc = pc
    S.s[state.STEPS] += steps


@njit
def meet(S, thread, step, what, base):
    """What orders threads, or lets one wait: rare steps, after which another thread may run."""
    r, row = S.r, S.code[step * ROW : (step + 1) * ROW]
    target, a, b = base + row[TARGET], i64(r, base + row[A]), i64(r, base + row[B])
    if op.LOAD_WORD <= what <= op.ATOMIC_CAS:
        result = access_word(S, thread, step, what, a, b, i64(r, base + row[C]), row[NUMBER])
        if what != op.STORE_WORD:
            put(r, target, result)
    elif what == op.BARRIER:
        arrive(S, thread, step, row[A], row[NUMBER])
    elif what == op.SLEEP:
        S.threads[thread].doing, S.threads[thread].wake = state.SLEEPING, now_ns(S) + (a & 0xFFFFFFFF)
    elif what == op.RETURN:
        endings.end_thread(S, thread, step)
    elif what == op.MBARRIER_INIT:
        mbarriers.init_mbarrier(S, thread, step, (a + row[NUMBER]) & 0xFFFFFFFF, b & 0xFFFFFFFF)
    elif what == op.MBARRIER_INVALIDATE:
        mbarriers.invalidate_mbarrier(S, thread, step, (a + row[NUMBER]) & 0xFFFFFFFF)
    elif what == op.MBARRIER_ARRIVE:
        mbarriers.arrive_expecting(S, thread, step, (a + row[NUMBER]) & 0xFFFFFFFF, b & 0xFFFFFFFF)
    elif what == op.MBARRIER_TRY_WAIT:
        has_ended = mbarriers.phase_has_ended(S, thread, step, (a + row[NUMBER]) & 0xFFFFFFFF, b)
        put(r, target, bit(has_ended))
        if not has_ended:
            S.threads[thread].doing, S.threads[thread].wake = state.SLEEPING, now_ns(S) + 100
    elif what == op.FENCE_ASYNC:
        mbarriers.fence_async(S, thread)
    elif what == op.FENCE_MBARRIER_INIT:
        mbarriers.fence_mbarriers(S, thread)
    elif what == op.FENCE_TENSOR_MAP:
        copies.fence_map(S, thread, step, a + row[NUMBER])
    elif what == op.COPY_BOX:
        copy_box(S, thread, step, base)
    elif what == op.READS_SUM or what == op.WRITES_SUM:
        products.touch_sum(S, thread, step, row[A], what == op.WRITES_SUM)
    else:
        S.threads[thread].doing = state.AT_WARP
        warp_arrives(S, thread, step, what)


@njit
def copy_box(S, thread, step, base):
    row = S.code[step * ROW : (step + 1) * ROW]
    extra = row[NUMBER]
    places = (
        np.int64(i32(S.r, base + S.extra[extra])),
        np.int64(i32(S.r, base + S.extra[extra + 1])),
        np.int64(i32(S.r, base + S.extra[extra + 2])),
    )
    to = (i64(S.r, base + row[A]) + S.extra[extra + 3]) & 0xFFFFFFFF
    barrier = (i64(S.r, base + row[C]) + S.extra[extra + 4]) & 0xFFFFFFFF
    copies.ask_for_box(S, thread, step, to, i64(S.r, base + row[B]), places, barrier)


@njit
def warp_arrives(S, thread, step, what):
    """`.sync.aligned`: when all threads of the warp (of the warpgroup, for a product) are here, it is done once."""
    size = S.s[state.BLOCK_THREADS] if what == op.WGMMA else state.WARP
    first = thread - thread % size
    for other in range(first, first + size):
        if S.threads[other].doing != state.AT_WARP:
            return
        if S.threads[other].pc != step + 1 and other // state.WARP != thread // state.WARP:
            return  # its warp is not here yet
        if S.threads[other].pc != step + 1:
            fault(S, faults.DIVERGED, thread, step, S.threads[other].pc - 1)
            return
    warp = first // state.WARP
    if what == op.WGMMA_FENCE:
        S.warps[warp].is_dirty = 0
    elif what == op.WGMMA_COMMIT:
        products.commit_group(S, warp)
    elif what == op.WGMMA_WAIT:
        products.wait_for_groups(S, warp, step, S.code[step * ROW + NUMBER])
    else:
        product(S, first, size, step)
    for other in range(first, first + size):
        S.threads[other].doing = state.READY


@njit
def product(S, first, size, step):
    """Operands must be the same for all threads."""
    row, slots = S.code[step * ROW : (step + 1) * ROW], S.s[state.SLOTS]
    for thread in range(first + 1, first + size):
        for operand in (row[A], row[B], row[C]):
            if i64(S.r, thread * slots + operand) != i64(S.r, first * slots + operand):
                fault(S, faults.DIVERGED, thread, step, step)
                return
    at = first * slots
    left, right, scale = i64(S.r, at + row[A]), i64(S.r, at + row[B]), i64(S.r, at + row[C])
    products.begin_product(S, first, step, row[TARGET], row[NUMBER], left, right, scale)
