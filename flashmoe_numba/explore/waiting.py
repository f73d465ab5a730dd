"""What a fiber that cannot go on waits for: the words it looked at since it last paused, and what it wants."""

from __future__ import annotations

from typing import Any

from ..device.fibers import Fiber
from ..kernel import queue, signals

COUNTERS = ("HEAD", "TAIL", "GATES_DONE", "GATE_OPEN", "PACKETS_SEEN", "GEMM_TASKS", "HIDDEN_ROWS", "TOTAL")


def waiting(fiber: Fiber) -> str:
    """One line: who, where, and the words with their values."""
    actor: Any = getattr(fiber, "actor", None)
    looked = actor.looked_before | actor.looked if actor else {}
    words = [_word(region, i, value, actor.epoch) for (region, i), value in looked.items()]
    if fiber in fiber.block.waiting:
        words = [f"a barrier that {len(fiber.block.waiting)} of {fiber.block.live} lanes have reached"]
    return f"{fiber.place()}: {'; '.join(words) or 'has not looked at anything'}"


def _word(region: Any, i: int, value: int, epoch: int) -> str:
    name = f"{region.name}[{i}]"
    if "_flag" in region.name:
        return f"{name} is (call {value >> 32}, {value & signals.ROWS_MASK} rows), wanted call {epoch}"
    if "queue.tasks" in region.name:
        place = i // queue.TASK_WORDS
        return f"{name}, the stamp of place {place}, is {value}, wanted {epoch}"
    if "queue.counters" in region.name:
        counter = COUNTERS[i // queue.COUNTER_STRIDE % queue.NUM_COUNTERS]
        return f"{name}, {counter}, is {value}"
    if "control" in region.name and i == signals.ABORT:
        return f"{name}, the abort word, is {value}"
    return f"{name} is {value}"
