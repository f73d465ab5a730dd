"""What mpirun says goes on to whoever started it, but for two things: marks, and what mpirun says of an interrupt.

A mark is how a guard or a rank of any host tells that it has come so far (launch.py): a byte that no text has, and a
letter, on its stderr.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from typing import IO

MARK = b"\x1e"
OWN_LINES = re.compile(  # of mpich's mpirun, of its parts on hosts, and of MPI
    rb"(?:\[(?:mpiexec|proxy:[^\]@]*)@[^\]]*\]|Abort\(\d+\) on node )[^\n]*\n"
    rb"|(?m:^)(?:={79}|=   [A-Z]|YOUR APPLICATION TERMINATED WITH |This typically refers to a problem with your app"
    rb"|Please see the FAQ page for debugging sugg|\n)(?:(?<=\n)|[^\n]*\n)"  # where ranks end by its signal, on stdout
)
END_PATIENCE_S = 2.0  # for what is still in a pipe that somebody beside mpirun may hold


def mark(letter: str) -> None:
    """Tell whoever started this rank."""
    os.write(2, MARK + letter.encode())


class Relay:
    """Of one pipe, in a thread of its own.

    Attributes:
        marks: letters of the marks so far.
        interrupted: set it before mpirun is: its lines about that are left out.

    Args:
        write: takes what is passed on; it may raise an OSError where nobody listens any more.
    """

    def __init__(self, pipe: IO[bytes], write: Callable[[bytes], object]) -> None:
        self.marks, self.interrupted = "", False
        self._pipe, self._write = pipe, write
        self._held = b""  # of what was read: half a mark, or after an interrupt half a line
        self._thread = threading.Thread(target=self._work, name="flashmoe relay", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Once mpirun is over: wait for the rest."""
        self._thread.join(END_PATIENCE_S)

    def _work(self) -> None:
        with self._pipe:
            try:
                while data := os.read(self._pipe.fileno(), 1 << 16):
                    self._pass_on(data)
                self._write(self._held)
            except OSError:  # whoever reads our output has seen enough: mpirun hears so by its pipe
                pass

    def _pass_on(self, data: bytes) -> None:
        text, *rest = (self._held + data).split(MARK)
        for part in rest:
            self.marks += part[:1].decode(errors="replace")
            text += part[1:]
        self._held = MARK if rest and not rest[-1] else b""
        if self.interrupted:
            whole, newline, part = text.rpartition(b"\n")
            text, self._held = OWN_LINES.sub(b"", whole + newline), part + self._held
        if text:
            self._write(text)


def writer_to(descriptor: int) -> Callable[[bytes], object]:
    """A `write` of a Relay: all of it, to this file."""

    def write(data: bytes) -> None:
        while data:
            data = data[os.write(descriptor, data) :]

    return write
