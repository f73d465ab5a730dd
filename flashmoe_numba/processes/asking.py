"""Hosts are asked before anything starts: who they are, what they have, and whether they reach each other.

A host is asked by a process that a launcher starts there (answer.py), which stays until all have answered, and listens
meanwhile. Where a launcher passes no input on, nothing is known of who reaches whom.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from .description import ROOT, describe
from .machine import machine_name
from .reaching import PORT_VARIABLES, Listener, Place

ANSWER = "flashmoe_numba.processes.answer"
PATIENCE_S = 30.0  # for each of the two answers
END_PATIENCE_S = 1.0
HERE = "this machine"


def ask_all(names: Sequence[str], begin: Sequence[str]) -> dict[str, str]:
    """Machines by host.

    Args:
        begin: a launcher's command, to which a host and a command for its shell are added.

    Raises:
        ConnectionError: a host cannot be reached, cannot run this, or does not reach another one.
        ValueError: two names of one machine.
    """
    with ThreadPoolExecutor(len(names)) as pool, ExitStack() as asked:  # their end is that of threads that wait
        hosts = [asked.enter_context(_Asked(name, begin)) for name in names]
        answers = dict(zip(names, pool.map(_Asked.answer, hosts), strict=True))
        machines = {name: str(answer["machine"]) for name, answer in answers.items()}
        _require_apart(machines)
        places = {name: answer["place"] for name, answer in answers.items()}
        if machine_name() not in machines.values():
            places[HERE] = Listener().place
        if not any(name in os.environ for name in PORT_VARIABLES):  # else who may use which ports is somebody's choice
            _require_reached(places, list(pool.map(lambda host: host.not_reached(places), hosts)))
    return machines


def _require_apart(machines: Mapping[str, str]) -> None:
    for name, machine in machines.items():
        first = next(other for other in machines if machines[other] == machine)
        if first != name:
            raise ValueError(f"each host must be named once, but {first} and {name} are one machine")


def _require_reached(places: Mapping[str, Place], found: Sequence[Sequence[str]]) -> None:
    for name, others in zip(places, found, strict=False):  # this machine, the last, was not asked
        for other in others:
            at = ", ".join(places[other]["addresses"])
            rule = "MPI and mpirun need all TCP ports between all of them"
            raise ConnectionError(f"{name} does not reach {other} at {at}: {rule}")


class _Asked:
    """One host that is asked, until this is left."""

    def __init__(self, name: str, begin: Sequence[str]) -> None:
        self._name, self._launcher = name, begin[0]
        python = [sys.executable, "-Pm", ANSWER]
        self._command = shlex.join(python)
        pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        question = shlex.join(["env", f"PYTHONPATH={_python_path()}", *python])
        try:  # in a session of its own, so that what a launcher begins ends with it
            self._process: Any = subprocess.Popen([*begin, name, question], text=True, start_new_session=True, **pipes)
        except OSError as error:
            raise ConnectionError(f"{name} cannot be reached: {error}") from None

    def __enter__(self) -> _Asked:
        return self

    def __exit__(self, *_: object) -> None:
        """Its end is the end of our pipe to it."""
        process = self._process
        with contextlib.suppress(OSError):  # it has gone before it was told all
            process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_PATIENCE_S)
        self._end()
        process.stdout.close()
        process.stderr.close()

    def _end(self) -> None:
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def answer(self) -> dict[str, Any]:
        """What it says of itself; a login may have said something before.

        Raises:
            ConnectionError: it says nothing, or has other things than this machine.
        """
        found, said = self._read(lambda answer: isinstance(answer, dict) and {"machine", "package"} <= answer.keys())
        if found is None:
            raise ConnectionError(self._why(said))
        ours = describe()["package"]
        if found["package"] != ours:
            raise ConnectionError(f"{self._name} must have what is here, {ours}, got {found['package']}")
        return dict(found)

    def not_reached(self, places: Mapping[str, Place]) -> list[str]:
        """Those of the other hosts that it does not reach."""
        others = {name: place for name, place in places.items() if name != self._name}
        with contextlib.suppress(OSError):  # it has gone: no input came there
            print(json.dumps(others), file=self._process.stdin, flush=True)
        found, _ = self._read(lambda answer: isinstance(answer, list))
        return found or []

    def _read(self, is_it: Callable[[Any], bool]) -> tuple[Any, list[str]]:
        """(the next answer of this kind or None, lines that came before it)."""
        said: list[str] = []
        limit = threading.Timer(PATIENCE_S, self._end)
        limit.start()
        try:
            for line in self._process.stdout:
                with contextlib.suppress(ValueError):
                    if is_it(answer := json.loads(line)):
                        return answer, said
                said.append(line.strip())
            self._process.wait()
        finally:
            limit.cancel()
        return None, said

    def _why(self, said: Sequence[str]) -> str:
        """It has not answered."""
        self._end()  # what a launcher left behind, such as a connection to be shared, may hold stderr open
        errors, code = self._process.stderr.read().strip().splitlines(), self._process.returncode
        last = (errors or said or [f"status {code}"])[-1]
        if code == -signal.SIGKILL:
            return f"{self._name} has not answered within {PATIENCE_S:g} s"
        if code == 255:
            return f"{self._name} cannot be reached by {self._launcher}: {last}"
        if code != 0:
            return f"{self._name} cannot run {self._command}, which must be there as here: {last}"
        return f"{self._name}, asked by {self._launcher}, gave no answer that can be read: {said[-1:]}"


def _python_path() -> str:
    """Where modules are found here, for an interpreter that starts elsewhere."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(dict.fromkeys([*filter(None, given), str(ROOT)]))
