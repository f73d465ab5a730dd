"""What a fiber that cannot go on waits for: the words it looked at since it last paused, and what it wants."""

from __future__ import annotations

from ...device.fibers import Fiber
from .cells import split_name, value_of, word
from .memory import Actor


def waiting(fiber: Fiber) -> str:
    """One line: who, where, and the words with their values."""
    actor: Actor | None = fiber.actor
    words = []
    if fiber in fiber.block.waiting:
        words = [f"a barrier that {len(fiber.block.waiting)} of {fiber.block.live} lanes have reached"]
    elif actor is not None:
        looked = actor.looked_before | actor.looked
        words = [_looked_at(region.name, i, value, actor.epoch) for (region, i), value in looked.items()]
    return f"{fiber.place()}: {'; '.join(words) or 'has not looked at anything'}"


def _looked_at(array: str, i: int, value: int, epoch: int) -> str:
    """A word, its value, and the value that is waited for where there is one."""
    name, meaning = f"{array}[{i}]", word(array, i)
    told = f"{name}, {meaning}, is {value_of(array, value)}" if meaning else f"{name} is {value_of(array, value)}"
    what = split_name(array)[1]
    if what.endswith("_flag"):
        return f"{told}, wanted call {epoch}"
    return f"{told}, wanted {epoch}" if what == "tasks" else told
