"""Other machines: how a command gets there, and whether it does.

A launcher is what mpirun starts its part on another host by: one of those that it knows by name, or a program that is
called as ssh is. Hosts that ssh or such a program reaches are asked first (asking.py), so that one that is down, that
has another version, that is there twice or that does not reach another one is named before anything starts; batch
systems know themselves which hosts there are.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass

SSH = ("ssh", "-x", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
ASKED = {"ssh": SSH, "rsh": ("rsh",)}
# of mpich's mpirun, those that lead to other hosts, and by which program each does: without it mpirun waits for ever
LAUNCHERS = {"ssh": "ssh", "rsh": "rsh", "slurm": "srun", "ll": "poe", "lsf": "blaunch", "sge": "qrsh"}
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
        known = self.launcher if self.launcher in LAUNCHERS else "ssh"
        how = ["-launcher", known, "-launcher-exec", find_starter(self.launcher)]
        return [*how, "-hosts", ",".join(self.names), "-ppn", str(num_ranks // len(self.names))]

    def ask(self) -> dict[str, str]:
        """Machine names by host, where they can be asked.

        Raises:
            ConnectionError: a host cannot be reached, cannot run this, or does not reach another one.
            ValueError: two names of one machine.
        """
        if self.launcher in LAUNCHERS and self.launcher not in ASKED:
            return {}
        from .asking import ask_all

        return ask_all(self.names, ASKED.get(self.launcher, (self.launcher,)))


def check_launcher(name: str) -> None:
    """Raise a ValueError if nothing is called so."""
    if name not in LAUNCHERS and shutil.which(name) is None:
        raise ValueError(f"launcher must be one of {', '.join(LAUNCHERS)} or a program, got {name!r}")


def find_starter(launcher: str) -> str:
    """The program of a launcher, where mpirun looks for it.

    Raises:
        ValueError: it is not on this machine.
    """
    program = LAUNCHERS.get(launcher, launcher)
    folders = {"lsf": ["LSF_BINDIR"], "sge": ["SGE_ROOT", "ARC"]}.get(launcher, [])
    own = [os.environ.get(name, "") for name in folders]
    own = [os.path.join(own[0], "bin", own[1])] if len(own) == 2 and all(own) else own[:1]
    found = shutil.which(program, path=os.pathsep.join([*filter(None, own), os.environ.get("PATH", os.defpath)]))
    if found is None:
        raise ValueError(f"{launcher} needs {program}, which is not in PATH here")
    return found
