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
from .world import Trial, make_call

NAP_S = 1e-4


class Raised(Exception):
    """An error of a rank's own."""


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
    """The arrays that it makes for a layer, before any call, lie where the parent can see them."""

    def __init__(self, memory: Memory, rank_idx: int) -> None:
        super().__init__()
        self._memory, self._rank_idx = memory, rank_idx
        self.has_layer = False

    def zeros(self, size: int, dtype: Any) -> m.Array:
        if self.has_layer:
            return super().zeros(size, dtype)
        return self._memory.zeros(self._rank_idx, size, dtype)


def be_rank(world: Trial, memory: Memory, rank_idx: int) -> NoReturn:
    """Run as rank `rank_idx`, and end this process."""
    words = memory.words[rank_idx]
    signal.signal(signal.SIGUSR1, lambda *_: _raise(words))
    try:
        words[m.OUTCOME] = _make_calls(world, memory, rank_idx)
    except BaseException as error:
        memory.say(rank_idx, str(error) if isinstance(error, FlashMoEError) else traceback.format_exc())
        known = m.GIVEN_UP if isinstance(error, FlashMoEError) else m.RAISED if isinstance(error, Raised) else m.FAILED
        words[m.OUTCOME] = known
    finally:
        os._exit(0)


def _raise(words: m.Array) -> None:
    if words[m.PHASE] in (m.BETWEEN_CALLS, m.IN_A_CALL):
        words[m.PHASE] = m.DONE  # once
        raise Raised


def _make_calls(world: Trial, memory: Memory, rank_idx: int) -> int:
    """The outcome; errors of the layer go through."""
    words = memory.words[rank_idx]
    with _make_layer(world, memory, rank_idx) as layer:
        words[m.PHASE] = m.BETWEEN_CALLS
        while memory.go[0] == 0:
            time.sleep(NAP_S)
        try:
            wrong = _first_wrong(world, memory, layer)
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
        save=world.save,
    )
    backend.has_layer = True
    queue = layer._ranks[0].queue
    memory.words[rank_idx, [m.COUNTERS, m.TASKS]] = queue.counters.ctypes.data, queue.tasks.ctypes.data
    return layer


def _first_wrong(world: Trial, memory: Memory, layer: FlashMoE) -> int | None:
    """The first call whose results are not the undisturbed ones, bit for bit."""
    rank, saved = layer._ranks[0], None
    words = memory.words[rank.rank_idx]
    for call in range(world.num_calls):
        tokens, expected = (each[call % len(world.tokens)][rank.rank_idx] for each in (world.tokens, world.expected))
        _suffer(memory, rank)
        words[m.CALLS], words[m.TASKS_BEFORE] = call + 1, rank.control[s.PROGRESS]
        words[m.PHASE] = m.IN_A_CALL
        found, saved = make_call(layer, tokens, saved, world.save)
        words[m.PHASE] = m.BETWEEN_CALLS
        if found != [expected]:
            return call
    return None


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
