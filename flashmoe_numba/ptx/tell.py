"""A fault in words: which rule, where in the text, which thread, what memory, and who else was there."""

from __future__ import annotations

from collections import Counter

from . import state
from .faults import BARRIER_DIVERGED, DEADLOCK, DIVERGED, RULES
from .memory import ACTOR_BITS, CLOCK_BITS, Arena
from .program import Program
from .state import State
from .watch import A_READ, ORDINARY_WRITE


def tell(S: State, program: Program, arena: Arena) -> str:
    """One line."""
    code, thread, step = (int(S.s[i]) for i in (state.FAULT, state.FAULT_THREAD, state.FAULT_STEP))
    address, cell = int(S.s[state.FAULT_ADDRESS]), int(S.s[state.FAULT_CELL])
    parts = [f"{RULES[code]}: {_who(S, thread)}, {_where(program, step)}"]
    if code in (BARRIER_DIVERGED, DIVERGED):
        parts.append(f"another thread of its warp is at {_where(program, address)}")
    elif code == DEADLOCK:
        parts += _waiting(S, program)
    elif address:
        parts.append(f"at {arena.describe(address)}")
    if cell > 0:
        other = int(S.s[state.FAULT_OTHER_STEP])
        what = {A_READ: "read it", ORDINARY_WRITE: "wrote it by an ordinary store, before an atomic one"}.get(other)
        what = what or f"wrote it, {_where(program, other)}"
        parts.append(f"{_who(S, cell >> CLOCK_BITS & (1 << ACTOR_BITS) - 1)} {what}")
    return "; ".join(parts)


def _who(S: State, actor: int) -> str:
    threads = int(S.s[state.BLOCK_THREADS])
    if actor >= S.threads.size:
        return "the asynchronous proxy"
    return f"thread {actor % threads} of block {actor // threads}"


def _where(program: Program, step: int) -> str:
    instruction = program.instruction(max(step, 0))
    return f"PTX line {instruction.line}: {instruction.text}"


def _waiting(S: State, program: Program) -> list[str]:
    """Who waits where and never goes on."""
    places = Counter((int(one["block"]), int(one["pc"]) - 1) for one in S.threads if one["doing"] != state.ENDED)
    return [f"{n} threads of block {block} wait at {_where(program, step)}" for (block, step), n in places.items()]
