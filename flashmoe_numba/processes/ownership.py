"""What belongs to the process and the object that made it: threads, windows, memory that peers write to, a GPU.

None of it can be copied, and a forked child has none of it: its threads are not there, and its memory and its GPU
context are the parent's. So copies are refused, and in a child an error comes before anything is waited for.
"""

from __future__ import annotations

import os
from typing import Any, NoReturn, Self

from ..errors import FlashMoEError


class Owned:
    """Base of classes whose objects hold such things."""

    _made_in: int

    def __new__(cls, *_: Any, **__: Any) -> Self:
        made = super().__new__(cls)
        made._made_in = os.getpid()
        return made

    @property
    def inherited(self) -> bool:
        """Is this process another one than made it, by a fork?"""
        return os.getpid() != self._made_in

    def require_maker(self) -> None:
        """Raise a FlashMoEError in a process that was forked from the one that made this."""
        if self.inherited:
            name = type(self).__name__
            raise FlashMoEError(
                f"this {name} was made in process {self._made_in}, and process {os.getpid()} is a fork of it, without "
                f"its threads: make a {name} in each process, and best start processes by multiprocessing's 'spawn'"
            )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Asked by copy.copy, copy.deepcopy and pickle."""
        name = type(self).__name__
        raise TypeError(
            f"a {name} cannot be copied or pickled, because it holds threads and memory that its ranks write to: make "
            "another one, from the same config and weights"
        )
