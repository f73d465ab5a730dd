"""What a kernel costs, as far as instructions and addresses say: warps run in step, and each of their accesses is seen.

A warp executes the instruction that is the earliest in the text among its threads, for all threads that are there,
which is how threads that part ways meet again. Of an access of a warp it is counted how many sectors of 32 bytes it
touches in global memory and how many of its bytes were asked for, and in shared memory how often a bank must be read
in turn (CUDA programming guide, global and shared memory of compute capability 5.0 and later).

Work is counted by the kind of the task that the block is at: which it is at is seen as it loads the kind from its
rank's queue, and that it waits as it asks for the next one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from reference.task_kinds import NORM_WEIGHTS

from ..kernel.queue import KIND_BITS
from . import faults, state
from . import opcodes as op
from .compiled import njit
from .copies import finish_due_copies
from .interpret import run_thread
from .order import now_ns
from .program import CODE, NUMBER, ROW, SHARED_WINDOW, A, C
from .schedule import skip_time
from .typed import i32, i64
from .watch import fault

(
    WARP_STEPS, THREAD_STEPS, BARRIERS, COPIES, PRODUCTS, ATOMICS,
    GLOBAL_REQUESTS, GLOBAL_SECTORS, GLOBAL_BYTES, SHARED_REQUESTS, SHARED_TURNS, NUM_COUNTERS,
) = range(12)  # fmt: skip
WAITING, OS_BLOCK, FIRST_KIND = range(3)  # what a block is at; kinds of tasks from there on
NUM_ACTIVITIES = FIRST_KIND + NORM_WEIGHTS + 1  # the last kind
KIND_MASK = (1 << KIND_BITS) - 1
REQUESTS, SECTORS, EXCESS, STEP_COUNTERS = range(4)  # of one step of the program
SECTOR_BYTES, BANKS, BANK_BYTES = 32, 32, 4
WARP_TURNS = 1000  # as `schedule.TURNS`
WARP_TURN = 256  # instructions of a warp before the next one has its turn


class Profile(NamedTuple):
    """What is counted, and what that needs."""

    counts: Any  # int64 [NUM_ACTIVITIES, NUM_COUNTERS]
    steps: Any  # int64 [steps, STEP_COUNTERS], of global memory
    activity: Any  # int64 [blocks]
    queues: Any  # int64 [ranks, 2]: address and bytes of each rank's queue
    task_bytes: Any  # int64 [2]: of a task, and before the word of its kind
    together: Any  # int64 [WARP]: the threads that make one access
    seen: Any  # int64 [8 * WARP]
    banks: Any  # int64 [BANKS]


@njit
def run_in_step(S, P):
    """`schedule.run`, a warp at a time."""
    warp = S.s[state.CURRENT]
    for _ in range(WARP_TURNS):
        if S.s[state.NUM_COPIES] > 0:
            finish_due_copies(S)
        warp = next_warp(S, warp)
        if warp < 0:
            if not skip_time(S):
                return False
            warp = 0
            continue
        for _ in range(WARP_TURN):
            if not step_warp(S, P, warp):
                break
        warp += 1
        if S.s[state.STEPS] > S.s[state.LIMIT]:
            fault(S, faults.STEP_LIMIT, 0, S.threads[0].pc, 0)
        if S.s[state.FAULT] != faults.NONE:
            return False
        S.s[state.CURRENT] = warp
    return True


@njit
def next_warp(S, first):
    """The first warp from there on of which a thread can go on; -1 if there is none."""
    time = now_ns(S)
    for i in range(S.threads.size):
        thread = (first * state.WARP + i) % S.threads.size
        if S.threads[thread].doing == state.SLEEPING and S.threads[thread].wake <= time:
            S.threads[thread].doing = state.READY
        if S.threads[thread].doing == state.READY:
            return thread // state.WARP
    return -1


@njit
def step_warp(S, P, warp):
    """One instruction of a warp. False if none of its threads can go on."""
    first, step = warp * state.WARP, 1 << 62
    for thread in range(first, first + state.WARP):
        if S.threads[thread].doing == state.READY:
            step = min(step, S.threads[thread].pc)
    if step == 1 << 62:
        return False
    n = 0
    for thread in range(first, first + state.WARP):
        if S.threads[thread].doing == state.READY and S.threads[thread].pc == step:
            P.together[n] = thread
            n += 1
    look(S, P, warp, step, n)
    for i in range(n):
        run_thread(S, P.together[i], 1)
    return S.s[state.FAULT] == faults.NONE


@njit
def look(S, P, warp, step, n):
    """Count an instruction of `n` threads of a warp, before they run it."""
    block = S.threads[P.together[0]].block
    what = i32(S.code, step * ROW + CODE)
    if op.LOAD16 <= what <= op.STORE128 or op.LOAD_WORD <= what <= op.ATOMIC_CAS:
        note_place(S, P, block, step, what)
    counts = P.counts[P.activity[block]]
    counts[WARP_STEPS] += 1
    counts[THREAD_STEPS] += n
    if op.LOAD16 <= what <= op.STORE128:
        look_at_access(S, P, counts, step, access_bytes(what), n)
    elif op.LOAD_WORD <= what <= op.ATOMIC_CAS:
        counts[ATOMICS] += n
    elif what == op.BARRIER:
        counts[BARRIERS] += 1
    elif what == op.COPY_BOX:
        counts[COPIES] += n
    elif what == op.WGMMA:
        counts[PRODUCTS] += 1


@njit
def access_bytes(what):
    size = what - op.LOAD16 if what <= op.LOAD128 else what - op.STORE16
    return 2 << size


@njit
def address_of(S, thread, step):
    """Of an ordinary access; an atomic one has no offset, but its order in that place."""
    address = i64(S.r, thread * S.s[state.SLOTS] + i32(S.code, step * ROW + A))
    if i32(S.code, step * ROW + CODE) > op.STORE128:
        return address
    return address + i32(S.code, step * ROW + NUMBER)


@njit
def note_place(S, P, block, step, what):
    """A processor that loads a task's kind is at that task; one that acquires a stamp waits for the next."""
    if P.activity[block] == OS_BLOCK:
        return
    address = address_of(S, P.together[0], step)
    for rank in range(P.queues.shape[0]):
        at = address - P.queues[rank, 0]
        if 0 <= at < P.queues[rank, 1]:
            at %= P.task_bytes[0]
            if at == P.task_bytes[1] and what == op.LOAD64:
                P.activity[block] = FIRST_KIND + (S.m64[(address - S.s[state.BASE]) >> 3] & KIND_MASK)
            elif at == 0 and what == op.LOAD_WORD:
                P.activity[block] = WAITING


@njit
def look_at_access(S, P, counts, step, num_bytes, n):
    space = i32(S.code, step * ROW + C)
    address = address_of(S, P.together[0], step)
    if space == op.SHARED or address >= SHARED_WINDOW:
        counts[SHARED_REQUESTS] += 1
        counts[SHARED_TURNS] += shared_turns(S, P, step, num_bytes, n)
        return
    sectors = different(S, P, step, SECTOR_BYTES, n)
    wanted = different(S, P, step, num_bytes, n) * num_bytes
    counts[GLOBAL_REQUESTS] += 1
    counts[GLOBAL_SECTORS] += sectors
    counts[GLOBAL_BYTES] += wanted
    P.steps[step, REQUESTS] += 1
    P.steps[step, SECTORS] += sectors
    P.steps[step, EXCESS] += sectors - (wanted + SECTOR_BYTES - 1) // SECTOR_BYTES


@njit
def different(S, P, step, unit, n):
    """Different units of so many bytes that the threads of one access begin in."""
    found = 0
    for i in range(n):
        place = address_of(S, P.together[i], step) // unit
        for j in range(found):
            if P.seen[j] == place:
                break
        else:
            P.seen[found] = place
            found += 1
    return found


@njit
def shared_turns(S, P, step, num_bytes, n):
    """The most different words of one bank; accesses of 8 and 16 bytes are made by halves and quarters of a warp."""
    part = max(1, num_bytes // BANK_BYTES)
    turns = 0
    for first in range(0, n, state.WARP // part):
        P.banks[:] = 0
        found, most = 0, 0
        for i in range(first, min(n, first + state.WARP // part)):
            address = address_of(S, P.together[i], step)
            for word in range(address // BANK_BYTES, (address + num_bytes - 1) // BANK_BYTES + 1):
                for j in range(found):
                    if P.seen[j] == word:
                        break
                else:
                    P.seen[found] = word
                    found += 1
                    P.banks[word % BANKS] += 1
                    most = max(most, P.banks[word % BANKS])
        turns += most
    return turns
