"""Which call each rank makes when: forwards, and backwards of earlier ones.

A *program* has a number for each call: 0 of a forward, else that of the forward which it is the backward of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from reference.layout import SAVES
from reference.scalars import check_one_of

FORWARD = 0
Program = tuple[int, ...]


class Astray(NamedTuple):
    """A rank whose last call is another one than that of the others, so that all must give up.

    Args:
        call: the forward that it is the backward of; 0: it is a forward.
    """

    rank: int
    call: int = FORWARD


def check_program(program: Program, save: str | None, astray: Sequence[Astray], epochs: int) -> None:
    """Raises ValueError, naming the rule."""
    if program and len(program) != epochs:
        raise ValueError(f"epochs must be the number of calls in program, {len(program)}, got {epochs}")
    for call, forward in enumerate(program, start=1):
        _check_backward("program", call, forward, program)
    used = [forward for forward in program if forward]
    if len(set(used)) < len(used):
        raise ValueError(f"program must have one backward of a forward, got {list(program)}")
    if astray and (not program or len({own.rank for own in astray}) < len(astray)):
        raise ValueError(f"astray must be different ranks, and needs a program, got {[*map(tuple, astray)]}")
    for own in astray:
        _check_backward("astray", epochs, own.call, program)
        if own.call == program[-1] or (own.call and own.call in program[:-1]):
            raise ValueError(f"astray must be in another call than others, and a new one, got backward of {own.call}")
    if (used or astray) and save is None:
        raise ValueError("program needs save, which is what a forward keeps for its backward")
    if save is not None:
        check_one_of("save", save, SAVES)


def _check_backward(name: str, call: int, forward: int, program: Program) -> None:
    if not 0 <= forward < call or (forward and program[forward - 1]):
        rule = f"{name} must have 0 for a forward, else the number of an earlier forward"
        raise ValueError(f"{rule}, got {forward} for call {call}")


def without(program: Program, call: int) -> Program:
    """The calls but for one, and for its backward if it is a forward."""
    gone = {call, *[i for i, forward in enumerate(program, start=1) if forward == call]}
    left = [i for i in range(1, len(program) + 1) if i not in gone]
    numbers = {FORWARD: FORWARD} | {i: number for number, i in enumerate(left, start=1)}
    return tuple(numbers[program[i - 1]] for i in left)


def in_words(program: Program) -> str:
    """`forward, forward, backward of 2`."""
    return ", ".join(f"backward of {forward}" if forward else "forward" for forward in program)
