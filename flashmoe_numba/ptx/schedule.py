"""Which thread goes next, by seed, and when a launch has ended."""

from __future__ import annotations

from . import faults, foreign, state
from .compiled import njit
from .copies import finish_due_copies
from .interpret import run_thread
from .order import draw, now_ns
from .watch import fault

ANY, IN_TURN, BLOCK_BY_BLOCK, FROM_ONE_BLOCK = range(4)  # modes
NUM_MODES = 4
NOBODY = -1
TURNS = 10_000  # of threads, before Python may look for signals: some tenths of a second


@njit
def run(S):
    """Run threads for some turns. False if all have ended, or something is wrong; else there is more to do."""
    for _ in range(TURNS):
        if S.s[state.NUM_COPIES] > 0:
            finish_due_copies(S)
        thread = next_thread(S)
        if thread == NOBODY:
            if not skip_time(S):
                return False
            continue
        S.s[state.CURRENT] = thread
        run_thread(S, thread, slice_steps(S))
        if S.s[state.STEPS] > S.s[state.LIMIT]:
            fault(S, faults.STEP_LIMIT, thread, S.threads[thread].pc, 0)
        if S.s[state.FAULT] != faults.NONE:
            return False
    return True


@njit
def slice_steps(S):
    """From a few to a few thousand."""
    return 4 << (draw(S) % 11)


@njit
def next_thread(S):
    """A thread that can go on, the first from a place on that the mode chooses; NOBODY if there is none."""
    threads, current, size = S.threads.size, S.s[state.CURRENT], S.s[state.BLOCK_THREADS]
    first = current + 1
    if S.s[state.MODE] == ANY:
        first = draw(S) % threads
    elif S.s[state.MODE] == BLOCK_BY_BLOCK:
        first = current - current % size + draw(S) % size if draw(S) % 64 else draw(S) % threads
    elif S.s[state.MODE] == FROM_ONE_BLOCK:
        first = (S.s[state.STEPS] >> 22) * 37 * size % threads
    time = now_ns(S)
    for i in range(threads):
        thread = (first + i) % threads
        if S.threads[thread].doing == state.READY:
            return thread
        if S.threads[thread].doing == state.SLEEPING and S.threads[thread].wake <= time:
            S.threads[thread].doing = state.READY
            return thread
    return NOBODY


@njit
def skip_time(S):
    """To when somebody wakes or a copy is due. False if the launch has ended, or nobody here ever goes on."""
    soonest, waiting = 1 << 62, NOBODY
    for thread in range(S.threads.size):
        if S.threads[thread].doing == state.SLEEPING:
            soonest = min(soonest, S.threads[thread].wake)
        elif S.threads[thread].doing != state.ENDED:
            waiting = thread
    for i in range(S.s[state.NUM_COPIES]):
        soonest = min(soonest, S.copies[i].due)
    if soonest < 1 << 62:
        if foreign.exists(S):
            foreign.sleep(soonest - now_ns(S))
        else:
            S.s[state.SKIPPED_NS] += max(0, soonest - now_ns(S))
        return True
    if waiting != NOBODY:
        fault(S, faults.DEADLOCK, waiting, S.threads[waiting].pc - 1, 0)
    return False
