"""A grid before its first step: registers, clocks, and nothing under way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reference.arrays import Array

from . import foreign, state
from .memory import HOST_ACTOR, STEP_BITS, Arena
from .opcodes import WGMMA
from .program import BLOCK, BLOCK_THREADS, CODE, DYNAMIC_BYTES, PARAMETERS, THREAD, Program
from .released import SCOPES
from .state import State
from .tensors import ROOM

MOST_WORDS = 8192  # that threads of a grid synchronize by


@dataclass(frozen=True)
class Grid:
    """What is launched.

    Args:
        arguments: of the kernel, 64 bits each.
        dynamic_bytes: of a block's shared memory, behind its own variables.
        shared: addresses of the blocks' shared memory.
    """

    program: Program
    num_blocks: int
    threads: int
    arguments: Sequence[int]
    dynamic_bytes: int
    shared: Sequence[int]

    @property
    def num_threads(self) -> int:
        return self.num_blocks * self.threads

    @property
    def warps(self) -> int:
        """Of a block."""
        return self.threads // state.WARP

    @property
    def actors(self) -> int:
        """Threads, and the asynchronous proxy's (state.py)."""
        return self.num_threads + self.num_blocks * (self.warps + state.MBARRIERS)


def new_state(grid: Grid, arena: Arena, others: Sequence[tuple[int, int]]) -> State:
    """The state of a grid on an arena, but for what a machine's options say.

    Args:
        others: (address, bytes) of memory outside of the arena (foreign.py).

    Raises:
        ValueError: more threads or steps than the machine can number, or products of other blocks than a warpgroup.
    """
    if grid.actors >= HOST_ACTOR:
        raise ValueError(f"blocks must have fewer than {HOST_ACTOR} threads and warps in all, got {grid.actors}")
    if len(grid.program.code) >= 1 << STEP_BITS:
        raise ValueError(f"text must have fewer than {1 << STEP_BITS} steps, got {len(grid.program.code)}")
    if WGMMA in grid.program.code[:, CODE] and grid.threads != state.WARPGROUP:
        raise ValueError(f"blocks of a kernel with wgmma must have {state.WARPGROUP} threads, got {grid.threads}")
    blocks, actors = grid.num_blocks, grid.actors
    S = State(
        code=grid.program.code.reshape(-1), extra=grid.program.extra, executed=_zeros(len(grid.program.code)),
        s=_zeros(state.NUM_SCALARS), r=_registers(grid).reshape(-1),
        threads=_zeros(grid.num_threads, dtype=state.THREAD), blocks=_zeros(blocks, dtype=state.BLOCK),
        warps=_zeros(blocks * grid.warps, dtype=state.WARP_STATE), arrived=_zeros(blocks, state.NAMED_BARRIERS),
        m=arena.bytes, m64=arena.bytes.view(np.int64), lines=arena.lines, cells=arena.cells,
        foreign=np.array(others, np.int64).reshape(-1, 2), clocks=_clocks(grid),
        words=_zeros(state.WORD_TABLE, dtype=state.WORD),
        released=_zeros(SCOPES, MOST_WORDS, 2, 2, actors, dtype=np.int32),
        released_by=_zeros(SCOPES, MOST_WORDS, 2, dtype=np.int32),
        mbarriers=_zeros(blocks, state.MBARRIERS, dtype=state.MBARRIER),
        mbarrier_clocks=_zeros(blocks, state.MBARRIERS, 2, 2, actors, dtype=np.int32),
        mbarrier_uses=_zeros(blocks, state.MBARRIERS, grid.threads, dtype=np.int32),
        fenced_maps=_zeros(blocks, state.MAPS, dtype=state.FENCED_MAP),
        copies=_zeros(blocks * state.COPIES_PER_BLOCK, dtype=state.COPY),
        copy_clocks=_zeros(blocks * state.COPIES_PER_BLOCK, actors, dtype=np.int32),
        products=_zeros(blocks, state.MOST_PRODUCTS, dtype=state.PRODUCT),
        group_ends=_zeros(blocks * grid.warps, state.MOST_GROUPS),
        scratch=_zeros(grid.threads, state.MOST_SUMS, dtype=np.float32), room=_zeros(ROOM, dtype=np.float64),
    )  # fmt: skip
    S.s[state.BASE], S.s[state.BLOCK_THREADS] = arena.base, grid.threads
    S.s[state.SHARED_BYTES] = grid.program.dynamic_at + grid.dynamic_bytes
    S.s[state.SLOTS], S.s[state.NUM_WORDS] = len(grid.program.first_slots), foreign.RELEASED_ROW + 1
    S.threads["block"] = np.arange(grid.num_threads) // grid.threads
    S.blocks["shared_at"] = np.array(grid.shared, np.int64) - arena.base
    S.warps["is_dirty"] = 1  # a warp has fenced nothing yet
    return S


def _zeros(*shape: int, dtype: Any = np.int64) -> Array:
    return np.zeros(shape, dtype)


def _registers(grid: Grid) -> Array:
    """int64 `[threads, slots]`."""
    threads = np.arange(grid.num_threads)
    registers = np.tile(grid.program.first_slots, (threads.size, 1))
    registers[:, THREAD], registers[:, BLOCK] = threads % grid.threads, threads // grid.threads
    registers[:, BLOCK_THREADS], registers[:, DYNAMIC_BYTES] = grid.threads, grid.dynamic_bytes
    registers[:, PARAMETERS : PARAMETERS + len(grid.arguments)] = grid.arguments
    return registers


def _clocks(grid: Grid) -> Array:
    """Nobody knows of anybody, and everybody is at the first of his clock."""
    clocks = _zeros(grid.num_threads, 2, grid.actors, dtype=np.int32)
    threads = np.arange(grid.num_threads)
    clocks[threads, 0, threads] = 1
    return clocks
