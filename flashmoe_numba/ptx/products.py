"""Products of warpgroups, wgmma (PTX ISA 9.7.15): each is made when some warp waits for it, or at once, by seed."""

from __future__ import annotations

from . import faults, state, tensors
from .compiled import njit
from .memory import CLOCK_BITS, STEP_SHIFT, WROTE, WROTE_AT
from .order import draw
from .typed import f32, put
from .watch import (
    ASYNC_PROXY,
    cell_of,
    fault,
    happens_before,
    note_read,
)


@njit
def product_actor(S, block, warp):
    """The actor that reads for the products of a warp of a block."""
    return S.threads.size + block * (S.s[state.BLOCK_THREADS] // state.WARP + state.MBARRIERS) + warp


@njit
def begin_product(S, first, step, sums, form, left, right, scale):
    """A product of the warpgroup of a block: `first` is its first thread, operands those of its threads alike."""
    block = S.threads[first].block
    num_warps = S.s[state.BLOCK_THREADS] // state.WARP
    lead = first // state.WARP
    if not scale:
        fault(S, faults.SCALE, first, step, 0)
        return
    number = S.warps[lead].issued
    if number - S.blocks[block].done == state.MOST_PRODUCTS:
        fault(S, faults.TOO_MANY, first, step, 0)
        return
    product = S.products[block, number % state.MOST_PRODUCTS]
    product.sums, product.left, product.right = sums, left, right
    product.form = form
    for warp in range(num_warps):
        if S.warps[lead + warp].is_dirty:
            fault(S, faults.WGMMA_UNFENCED, first + warp * state.WARP, step, 0)
            return
        S.warps[lead + warp].issued = number + 1
        reader = product_actor(S, block, warp) << CLOCK_BITS | number + 1
        thread = first + warp * state.WARP
        if not read_operand(S, thread, step, left, tensors.M, 16 * warp, 16 * warp + 16, reader):
            return
        if not read_operand(S, thread, step, right, form >> 4, 0, form >> 4, reader):
            return
    if draw(S) & 1 or S.s[state.LATE] == 0:
        make_products(S, first, step, number + 1)


@njit
def read_operand(S, thread, step, descriptor, num_rows, first_row, end_row, reader):
    """Rows of an operand in shared memory may be read now by the asynchronous proxy, and are noted as read."""
    block = S.threads[thread].block
    if tensors.operand_fault(descriptor, num_rows, S.s[state.SHARED_BYTES]):
        fault(S, faults.DESCRIPTOR, thread, step, descriptor)
        return False
    for row in range(first_row, end_row):
        for chunk in range(0, tensors.STEP, tensors.CHUNK):
            at = S.blocks[block].shared_at + tensors.operand_address(descriptor, row, chunk)
            for c in range(cell_of(S, at), cell_of(S, at + tensors.CHUNK - 1) + 1):
                word = S.cells[c, WROTE]
                if word <= 0:
                    fault(S, faults.UNINITIALISED, thread, step, at + S.s[state.BASE])
                    return False
                if not happens_before(S, word, thread, ASYNC_PROXY):
                    S.s[state.FAULT_OTHER_STEP] = S.cells[c, WROTE_AT] >> STEP_SHIFT
                    fault(S, faults.RACE, thread, step, at + S.s[state.BASE], word)
                    return False
                note_read(S, c, thread, reader, ASYNC_PROXY)
    return True


@njit
def make_products(S, first, step, end):
    """Make the block's products before number `end`, in order."""
    block, slots = S.threads[first].block, S.s[state.SLOTS]
    threads = S.s[state.BLOCK_THREADS]
    shared = S.m[S.blocks[block].shared_at : S.blocks[block].shared_at + S.s[state.SHARED_BYTES]]
    while S.blocks[block].done < end:
        product = S.products[block, S.blocks[block].done % state.MOST_PRODUCTS]
        n, kind = product.form >> 4, product.form & 15
        sums = S.scratch[:, : n // 2]
        for thread in range(threads):
            at = (first + thread) * slots + product.sums
            for i in range(n // 2):
                sums[thread, i] = f32(S.r, at + i)
        if tensors.multiply(sums, shared, product.left, product.right, n, kind, True, S.room):
            fault(S, faults.DESCRIPTOR, first, step, product.left)
            return
        for thread in range(threads):
            at = (first + thread) * slots + product.sums
            for i in range(n // 2):
                put(S.r, at + i, sums[thread, i])
        S.blocks[block].done += 1


@njit
def commit_group(S, warp):
    groups = S.warps[warp].groups
    S.group_ends[warp, groups % state.MOST_GROUPS] = S.warps[warp].issued
    S.warps[warp].groups = groups + 1


@njit
def wait_for_groups(S, warp, step, most):
    """All but the last `most` groups have been made, and happen before what the warp's threads do now."""
    groups = S.warps[warp].groups
    if groups <= most:
        return
    if most >= state.MOST_GROUPS:
        fault(S, faults.TOO_MANY, warp * state.WARP, step, 0)
        return
    end = S.group_ends[warp, (groups - most - 1) % state.MOST_GROUPS]
    first = warp * state.WARP
    block = S.threads[first].block
    make_products(S, block * S.s[state.BLOCK_THREADS], step, end)
    S.warps[warp].waited = max(S.warps[warp].waited, end)
    actor = product_actor(S, block, first % S.s[state.BLOCK_THREADS] // state.WARP)
    for thread in range(first, first + state.WARP):
        for proxy in range(2):
            S.clocks[thread, proxy, actor] = max(S.clocks[thread, proxy, actor], end)


@njit
def touch_sum(S, thread, step, slot, writes):
    """A register that products sum in is used by an ordinary instruction."""
    warp, block = thread // state.WARP, S.threads[thread].block
    for number in range(S.warps[warp].waited, S.warps[warp].issued):
        product = S.products[block, number % state.MOST_PRODUCTS]
        if product.sums <= slot < product.sums + (product.form >> 4) // 2:
            fault(S, faults.SUM_TOUCHED, thread, step, slot)
    if writes:
        S.warps[warp].is_dirty = 1
