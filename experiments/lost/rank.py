"""A rank of a run: a forked process that makes calls of the layer and leaves word of what became of them.

The layer, its ranks, the CPU backend and the compiled kernel are the users'; a heap of inherited memory stands in for
MPI's, and the backend's arrays lie where the parent can see them.
"""

from __future__ import annotations

import functools
import os
import signal
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from flashmoe_numba import FlashMoE
from flashmoe_numba.backends.cpu import CpuBackend
from flashmoe_numba.errors import FlashMoEError
from flashmoe_numba.heap.protocols import Memory as Place
from flashmoe_numba.heap.threads import ThreadHeap
from flashmoe_numba.kernel import control as s

from . import memory as m
from .memory import Memory
from .world import Trial

NAP_S = 1e-4


class InheritedHeap(ThreadHeap):
    """Segments that this process was forked with; it runs one rank. The parent has all ranks start together."""

    all_here = False

    def __init__(self, memory: Memory, rank_idx: int) -> None:
        super().__init__(len(memory.segments))
        self.rank_idx, self.rank_indices = rank_idx, range(rank_idx, rank_idx + 1)
        self._memory = memory

    def allocate(self, num_bytes: int, memory: Place) -> None:
        self.segments = self._memory.segments


class SeenBackend(CpuBackend):
    """Its arrays lie where the parent can see them."""

    def __init__(self, memory: Memory, rank_idx: int) -> None:
        super().__init__()
        self._memory, self._rank_idx = memory, rank_idx

    def zeros(self, size: int, dtype: Any) -> m.Array:
        return self._memory.zeros(self._rank_idx, size, dtype)


def be_rank(world: Trial, memory: Memory, rank_idx: int) -> NoReturn:
    """Run as rank `rank_idx`, and end this process."""
    words = memory.words[rank_idx]
    try:
        words[m.OUTCOME] = _make_calls(world, memory, rank_idx)
    except BaseException as error:
        memory.say(rank_idx, str(error) if isinstance(error, FlashMoEError) else traceback.format_exc())
        words[m.OUTCOME] = m.GIVEN_UP if isinstance(error, FlashMoEError) else m.FAILED
    finally:
        os._exit(0)


def _make_calls(world: Trial, memory: Memory, rank_idx: int) -> int:
    """The outcome; errors of the layer go through."""
    words = memory.words[rank_idx]
    with _make_layer(world, memory, rank_idx) as layer:
        words[m.PHASE] = m.BETWEEN_CALLS
        while memory.go[0] == 0:
            time.sleep(NAP_S)
        try:
            wrong = next((call for call in range(world.num_calls) if not _call(world, memory, layer, call)), None)
        finally:
            words[m.ENDED_NS] = time.monotonic_ns()
            words[m.PHASE] = m.DONE
    if wrong is not None:
        memory.say(rank_idx, f"call {wrong + 1} has a wrong result")
    return m.RIGHT if wrong is None else m.WRONG


def _make_layer(world: Trial, memory: Memory, rank_idx: int) -> FlashMoE:
    heap, backend = InheritedHeap(memory, rank_idx), SeenBackend(memory, rank_idx)
    layer = FlashMoE.from_parts(
        world.config,
        world.weights,
        heap,
        backend,
        num_processors=world.num_processors,
        deadline_s=world.deadline_s,
    )
    queue = layer._ranks[0].queue
    memory.words[rank_idx, [m.COUNTERS, m.TASKS]] = queue.counters.ctypes.data, queue.tasks.ctypes.data
    return layer


def _call(world: Trial, memory: Memory, layer: FlashMoE, call: int) -> bool:
    """Is the result of this call the undisturbed one, bit for bit?"""
    rank = layer._ranks[0]
    words = memory.words[rank.rank_idx]
    _suffer(memory, rank)
    words[m.CALLS], words[m.TASKS_BEFORE] = call + 1, rank.control[s.PROGRESS]
    words[m.PHASE] = m.IN_A_CALL
    y = layer(world.tokens[call % len(world.tokens)][rank.rank_idx])
    words[m.PHASE] = m.BETWEEN_CALLS
    return bool(y.tobytes() == world.expected[call % len(world.expected)][rank.rank_idx].tobytes())


def _suffer(memory: Memory, rank: Any) -> None:
    """What the parent wants to happen to this rank between two calls."""
    words = memory.words[rank.rank_idx]
    if words[m.DELAY_NS] > 0:
        words[m.FAULT_NS] = time.monotonic_ns()
        time.sleep(words[m.DELAY_NS] / 1e9)
        words[m.DELAY_NS], words[m.LATE_NS] = 0, time.monotonic_ns()
    if words[m.LAST_STEP] > 0:
        words[m.FAULT_NS] = time.monotonic_ns()
        for step in giving_up(memory, rank.rank_idx, int(words[m.CALLS]))[: int(words[m.LAST_STEP])]:
            step()
        os.kill(os.getpid(), signal.SIGKILL)


def giving_up(memory: Memory, rank_idx: int, epoch: int) -> list[Callable[[], None]]:
    """What `leave` does (kernel/waits.py), store by store, so that a rank can be lost between any two of them."""
    own, record = memory.control(rank_idx), s.departure(rank_idx, epoch, s.FAILED, 0)
    stores = [(own, word, value) for word, value in [(s.RECORD, s.WRITING), *s.record_stores(record)]]
    stores += [(memory.control(other), s.ABORT, rank_idx + 1) for other in range(len(memory.segments))]
    return [functools.partial(_store, *store) for store in stores]


def _store(words: m.Array, word: int, value: int) -> None:
    if word != s.ABORT or words[word] == 0:
        words[word] = value
