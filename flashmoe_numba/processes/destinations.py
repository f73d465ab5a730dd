"""Other machines: how a command gets there, and whether it does.

A launcher is what mpirun starts its part on another host by: one of those that it knows by name, or a program that is
called as ssh is. Hosts that ssh or such a program reaches are asked first, so that one that is down, that has another
version, or that is there twice is named before anything starts; batch systems know themselves which hosts there are.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .machine import machine_name

SSH = ("ssh", "-x", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
ASKED = {"ssh": SSH, "rsh": ("rsh",)}
STARTERS = {"ssh": "ssh", "rsh": "rsh", "slurm": "srun"}  # without its program mpirun waits for ever
LAUNCHERS = (*ASKED, "slurm", "ll", "lsf", "sge")  # of mpich's mpirun, those that lead to other hosts
ANSWER = "flashmoe_numba.processes.answer"
ANSWER_PATIENCE_S = 30.0
ROOT = Path(__file__).parents[2]
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Destinations:
    """Where ranks run: the same number of consecutive ones on each host.

    Args:
        names: as mpirun is told them.
        launcher: one of LAUNCHERS, or a program that is called as ssh is: options, a host, a command for its shell.

    Raises:
        ValueError: a name that cannot be one, or is there twice; no such launcher.
    """

    names: tuple[str, ...]
    launcher: str = "ssh"

    def __post_init__(self) -> None:
        for name in self.names:
            if not NAME.fullmatch(name):
                raise ValueError(f"hosts must be names or addresses with commas between them, got {name!r}")
        lower = [name.lower() for name in self.names]
        twice = next((name for name in lower if lower.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"each host must be named once, got {twice} {lower.count(twice)} times")
        check_launcher(self.launcher)

    def flags(self, num_ranks: int) -> list[str]:
        """Of mpirun, for so many ranks, a multiple of the hosts."""
        known = self.launcher in LAUNCHERS
        how = [self.launcher] if known else ["ssh", "-launcher-exec", str(shutil.which(self.launcher))]
        return ["-launcher", *how, "-hosts", ",".join(self.names), "-ppn", str(num_ranks // len(self.names))]

    def ask(self) -> dict[str, str]:
        """Machine names by host, where they can be asked.

        Raises:
            ConnectionError: a host cannot be reached, or cannot run this; ValueError: two names of one machine.
        """
        if self.launcher in LAUNCHERS and self.launcher not in ASKED:
            return {}
        with ThreadPoolExecutor(len(self.names)) as pool:
            answers = list(pool.map(self._ask_one, self.names))
        found = dict(zip(self.names, answers, strict=True))
        for name, machine in found.items():
            first = next(other for other in found if found[other] == machine)
            if first != name:
                raise ValueError(f"each host must be named once, but {first} and {name} are one machine")
        return found

    def _ask_one(self, name: str) -> str:
        """The machine's name."""
        begin = ASKED.get(self.launcher, (self.launcher,))
        python = [sys.executable, "-Pm", ANSWER]
        question = shlex.join(["env", f"PYTHONPATH={_python_path()}", *python])
        try:
            done = subprocess.run(
                [*begin, name, question],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=ANSWER_PATIENCE_S,
            )
        except subprocess.TimeoutExpired:
            raise ConnectionError(f"{name} has not answered within {ANSWER_PATIENCE_S:g} s") from None
        except OSError as error:
            raise ConnectionError(f"{name} cannot be reached: {error}") from None
        said = (done.stderr or done.stdout).strip().splitlines()
        last = said[-1] if said else f"status {done.returncode}"
        if done.returncode == 255:
            raise ConnectionError(f"{name} cannot be reached by {begin[0]}: {last}")
        if done.returncode != 0:
            raise ConnectionError(f"{name} cannot run {shlex.join(python)}, which must be there as here: {last}")
        return _read(name, done.stdout)


def _read(name: str, said: str) -> str:
    """The machine of an answer, which is its last line: a login may have said something before."""
    lines = said.strip().splitlines()
    try:
        theirs = json.loads(lines[-1])
        machine, package = str(theirs["machine"]), theirs["package"]
    except (IndexError, KeyError, TypeError, ValueError):
        raise ConnectionError(f"{name} gave no answer that can be read: {lines[-1:]}") from None
    ours = describe()["package"]
    if package != ours:
        raise ConnectionError(f"{name} must have what is here, {ours}, got {package}")
    return machine


def describe() -> dict[str, str]:
    """What a host says of itself."""
    from importlib import metadata

    versions = [f"{name} {metadata.version(name)}" for name in ("numpy", "numba", "mpi4py")]
    return {"machine": machine_name(), "package": ", ".join([f"flashmoe-numba of source {_source()}", *versions])}


def _source() -> str:
    """A hash of the files that ranks run: those of a checkout may differ where versions do not."""
    found = hashlib.blake2b(digest_size=6)
    for package in ("flashmoe_numba", "reference"):
        for file in sorted((ROOT / package).rglob("*.py")):
            found.update(file.read_bytes())
    return found.hexdigest()


def _python_path() -> str:
    """Where modules are found here, for an interpreter that starts elsewhere."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(dict.fromkeys([*filter(None, given), str(ROOT)]))


def check_launcher(name: str) -> None:
    """Raise a ValueError if nothing is called so."""
    if name not in LAUNCHERS and shutil.which(name) is None:
        raise ValueError(f"launcher must be one of {', '.join(LAUNCHERS)} or a program, got {name!r}")


def check_starter(name: str) -> None:
    """Raise a ValueError if the program of a launcher that is known by name is not on this machine."""
    starter = STARTERS.get(name, name)
    if name in STARTERS and shutil.which(starter) is None:
        raise ValueError(f"{name} needs {starter}, which is not in PATH here")
