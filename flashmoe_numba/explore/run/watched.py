"""The vocabulary's meaning when memory is watched: a fourth one beside the interpreted and the two compiled ones.

`watch` puts it into a kernel package loaded for interpretation. Verbs that touch no memory keep their meaning.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from greenlet import getcurrent

from ...device import fibers
from ...device.fibers import note_progress, preempt
from ...tile_gemm import stub
from .memory import Actor, Meeting, Region, joined
from .reports import Site, kernel_frame, place

IS_VERB = True  # reports name the caller


def ld_acquire(words: Region, i: int) -> int:
    preempt()
    return words.load(i, acquire=True)


def acquire_told(wire: Region, words: Region, i: int) -> int:
    return ld_acquire(words, i)


def ld_relaxed(words: Region, i: int) -> int:
    preempt()
    return words.load(i, acquire=False)


def st_release(words: Region, i: int, value: int) -> None:
    preempt()
    words.release(i, value)
    note_progress()
    preempt()


def fetch_add(words: Region, i: int, value: int) -> int:
    preempt()
    old = words.exchange(i, value, None)
    note_progress()
    preempt()
    return old


def cas(words: Region, i: int, expected: int, value: int) -> int:
    preempt()
    old = words.exchange(i, value, expected)
    if old == expected:
        note_progress()
    preempt()
    return old


def pause(attempt: int) -> int:
    fiber = getcurrent()
    actor = fiber.actor
    actor.wait_for_store(fiber)
    fibers.idle()
    fiber.polls_in_vain = False
    actor.poll += 1
    return attempt + 1


def now() -> int:
    """Kernel code takes the time when a wait begins, so what was looked at before is no part of it."""
    actor: Actor = getcurrent().actor
    actor.poll += 1
    actor.looked.clear()
    time = fibers.clock()
    if actor.time is not None:
        actor.take_time(time)
    return time


def block_sync() -> None:
    """The barrier; lanes that meet leave with one clock, and must have come to one place."""
    fiber = fibers.current()
    if fiber.lanes == 1:
        return
    block, actor = fiber.block, fiber.actor
    frame, meetings = kernel_frame(sys._getframe(1)), actor.memory.meetings
    meeting = meetings.setdefault(block, [])
    meeting.append((actor, frame.f_code, frame.f_lasti))
    fibers.block_barrier()
    if meetings.get(block) is meeting:  # the first to go on
        del meetings[block]
        _check_places(meeting)
        clock = joined([who.clock for who, *_ in meeting])
        for who, *_ in meeting:
            who.clock = clock
            who.tick()


def _check_places(meeting: list[Meeting]) -> None:
    first = meeting[0]
    for other in meeting[1:]:
        if other[1:] != first[1:]:
            one, two = (Site(who.name, who.epoch, place(code, at)) for who, code, at in (first, other))
            text = f"{one.who} at {one.where} meets {two.who} at {two.where}"
            first[0].memory.add("barrier", text, (one.where, two.where), None, (one, two))


def array_at(address: int, num_elements: int, like: Region) -> Region:
    return like.memory.at(address, num_elements)


def record_at(words: Region, at: int, like: Any) -> Any:
    return words.memory.record(words, at, like)


def tile_gemm(*arguments: Any) -> None:
    """Results may go to the memory of several ranks."""
    stub.multiply(array_at, *arguments)


WATCHED = (
    ld_acquire, acquire_told, ld_relaxed, st_release, fetch_add, cas, pause, now, block_sync, array_at, record_at,
    tile_gemm,
)  # fmt: skip


def watch(kernel: ModuleType) -> ModuleType:
    """Give the verbs of an interpreted package, and of all its modules, their watched meaning; returns it."""
    prefix = kernel.__name__ + "."
    for name, module in list(sys.modules.items()):
        if module is kernel or name.startswith(prefix):
            for verb in WATCHED:
                if hasattr(module, verb.__name__):
                    setattr(module, verb.__name__, verb)
    return kernel
