"""The machine: it launches a program on an arena, and says what was wrong.

All ranks of a launch share one memory. Each may count as a GPU of its own, which is what scopes are measured by.
"""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from reference.arrays import Array
from reference.code_cache import CodeCache

from . import state
from .faults import PtxFault
from .grid import Grid, new_state
from .memory import Arena
from .program import SHARED_BEGIN, Program, load
from .schedule import NUM_MODES, run
from .state import State
from .tell import tell

MOST_STEPS = 2_000_000_000
_compiling = threading.Lock()


def compiled_for(function: Any, *arguments: Any) -> Any:
    """A function of the machine, compiled at its first call in this process or found on the disk."""
    from numba import typeof

    with _compiling:
        signature = tuple(map(typeof, arguments))
        if signature not in function.overloads:
            function._cache = _TellingCache(function.py_func, _source_hash())
            function.compile(signature)
    return function


def run_to_end(function: Any, *arguments: Any) -> None:
    """Call a function of the machine for as long as it says that there is more to do; signals are heeded in between."""
    turns = compiled_for(function, *arguments)
    while turns(*arguments):
        pass


class _TellingCache(CodeCache):
    """Says so when it does not have what is asked for: the next step takes long."""

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        found = super().load_overload(signature, target_context)
        if found is None:
            print("flashmoe: compiling the PTX machine (about a minute; kept afterwards)", file=sys.stderr, flush=True)
        return found


@cache
def _source_hash() -> str:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"\0".join(source.read_bytes() for source in sources)).hexdigest()


@dataclass(kw_only=True)
class Machine:
    """Runs kernels.

    Args:
        arena: all memory.
        seed: of the schedule, and of what is late.
        late_ns: how long a store may stay hidden at most; 0 for never.
        blocks_per_gpu: so many blocks, by their index, are a GPU; None: all are one.
        most_steps: of a launch.
        foreign: asked at each launch: (address, bytes) of memory outside of the arena that kernels may touch, too,
            because this process shares it with others. If there is any, the machine's time is real.
    """

    arena: Arena
    seed: int = 0
    late_ns: int = 2000
    blocks_per_gpu: int | None = None
    most_steps: int = MOST_STEPS
    foreign: Callable[[], Sequence[tuple[int, int]]] = tuple

    def __post_init__(self) -> None:
        self.launches, self._one_at_a_time = 0, threading.RLock()
        self._programs: dict[str, Program] = {}
        self.executed: dict[str, Array] = {}
        self.steps = self.poisoned_rows = 0

    def program(self, text: str) -> Program:
        if text not in self._programs:
            self._programs[text] = load(text)
            self.executed[text] = np.zeros(len(self._programs[text].code), np.int64)
        return self._programs[text]

    def launch(
        self, text: str, entry: str, num_blocks: int, threads: int, arguments: Sequence[int], dynamic_bytes: int
    ) -> None:
        """Run a grid to its end.

        Raises:
            PtxFault: what was wrong first.
        """
        with self._one_at_a_time:
            code, fault = self._launch(text, entry, num_blocks, threads, arguments, dynamic_bytes)
        if code:  # raised here, where its traceback keeps nothing of the launch
            raise PtxFault(code, fault)

    def _launch(
        self, text: str, entry: str, num_blocks: int, threads: int, arguments: Sequence[int], dynamic_bytes: int
    ) -> tuple[int, str]:
        """The code of what was wrong, and what is said of it."""
        program = self.program(text)
        if entry != program.listing.entry:
            raise ValueError(f"entry must be {program.listing.entry!r}, got {entry!r}")
        shared = [self._shared_memory(program, dynamic_bytes, block) for block in range(num_blocks)]
        try:
            S = new_state(
                Grid(program, num_blocks, threads, arguments, dynamic_bytes, shared), self.arena, self.foreign()
            )
            self._set_up(S)
            self.execute(S, arguments)
            fault = tell(S, program, self.arena) if S.s[state.FAULT] else ""
        finally:
            for address in shared:
                self.arena.free(address)
            self.arena.forget_order()
        self.launches += 1
        self.executed[text] += S.executed
        self.steps += int(S.s[state.STEPS])
        self.poisoned_rows += int(S.s[state.POISONED_ROWS])
        return int(S.s[state.FAULT]), fault

    def _shared_memory(self, program: Program, dynamic_bytes: int, block: int) -> int:
        """Of one block. What lies between its variables belongs to nobody."""
        num_bytes = program.dynamic_at + dynamic_bytes
        address = self.arena.allocate(num_bytes, 4, f"shared memory of block {block}", is_shared=True)
        self.arena.forbid(address, SHARED_BEGIN)
        self.arena.forbid(address + program.static_end, program.dynamic_at - program.static_end)
        return address

    def execute(self, S: State, arguments: Sequence[int]) -> None:
        """Run all threads to their end, or to the first fault."""
        run_to_end(run, S)

    def _set_up(self, S: State) -> None:
        """What this machine's options say of a launch."""
        waits_for_others = S.foreign.size > 0  # for as long as a deadline says
        S.s[state.LIMIT] = np.iinfo(np.int64).max if waits_for_others else self.most_steps
        S.s[state.LATE], S.s[state.MODE] = self.late_ns, (self.seed + self.seed // NUM_MODES) % NUM_MODES
        S.s[state.RANDOM] = _mixed(self.seed * 1_000_003 + self.launches)
        S.blocks["gpu"] = np.arange(S.blocks.size) // (self.blocks_per_gpu or S.blocks.size)


def _mixed(value: int) -> int:
    """A seed of many bits, never 0."""
    value = (value + 1) * 0x9E3779B97F4A7C15 & (1 << 63) - 1
    return (value ^ value >> 29) or 1
