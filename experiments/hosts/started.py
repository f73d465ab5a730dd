"""A script under mpirun on hosts, as who started it sees it: by the files that its ranks leave in a folder.

`R.pid`; `R.digests`, one for each call; if a call failed `R.error`: when, by `time.monotonic`, and what was said.
mpirun is on host 0, where no rank is.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from flashmoe_numba.processes.launch import find_mpirun
from flashmoe_numba.processes.netmod import PREFERRED

from .calls import DIGEST_BYTES
from .faults import FIRST
from .namespaces import Hosts
from .stacks import at_what

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
START_LIMIT_S = 300.0
LOOK_S = 0.02


class Started:
    """`script FOLDER ARGUMENT...` on `num_ranks` ranks, the same number on each host but the first.

    Args:
        folder: empty. What is said on stderr goes there, and temporary files into its `tmp`.
    """

    def __init__(self, hosts: Hosts, num_ranks: int, folder: Path, script: str, *arguments: object) -> None:
        self.hosts, self.num_ranks, self.folder = hosts, num_ranks, folder
        (folder / "tmp").mkdir()
        where = hosts.where(num_ranks, range(FIRST, len(hosts.names)))
        command = [sys.executable, "-P", str(HERE / script), str(folder), *map(str, arguments)]
        with (folder / "stderr").open("w") as stderr:
            self.process = subprocess.Popen(
                [*hosts.on(0), find_mpirun(), *where, *command],
                env=_environment(folder), stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr,
            )  # fmt: skip

    @property
    def pids(self) -> list[int]:
        return [int((self.folder / f"{rank}.pid").read_text()) for rank in range(self.num_ranks)]

    def calls(self) -> list[int]:
        """That each rank has made."""
        files = [self.folder / f"{rank}.digests" for rank in range(self.num_ranks)]
        return [file.stat().st_size // DIGEST_BYTES if file.exists() else 0 for file in files]

    def digests(self, rank: int) -> list[bytes]:
        """Of that rank's calls."""
        data = (self.folder / f"{rank}.digests").read_bytes()
        return [data[at : at + DIGEST_BYTES] for at in range(0, len(data), DIGEST_BYTES)]

    def errors(self) -> dict[int, tuple[float, str]]:
        """rank -> when, what."""
        return errors_in(self.folder)

    def wait_for_calls(self, count: int) -> None:
        """Until every rank has made so many, or mpirun is over.

        Raises:
            TimeoutError: with what everybody is at.
        """
        limit = time.monotonic() + START_LIMIT_S
        while min(self.calls()) < count:
            if time.monotonic() > limit or self.process.poll() is not None:
                raise self.standstill(f"ranks do not begin: mpirun's status is {self.process.poll()}")
            time.sleep(LOOK_S)

    def wait_for_end(self, patience_s: float, ended: Callable[[], bool] = lambda: False) -> None:
        """Until mpirun is over, or it has `ended` otherwise; as long as calls are made.

        Raises:
            TimeoutError: with what everybody is at.
        """
        calls, since = -1, time.monotonic()
        while self.process.poll() is None and not ended():
            if (now := sum(self.calls())) != calls:
                calls, since = now, time.monotonic()
            if time.monotonic() - since > patience_s:
                raise self.standstill(f"not all ranks have ended, and no call was made for {patience_s:g} s")
            time.sleep(LOOK_S)

    def standstill(self, what: str) -> TimeoutError:
        """An error that says it, and what there is to see."""
        stderr = (self.folder / "stderr").read_text()[-3000:]
        seen = f"calls {self.calls()}, errors {self.errors()}"
        return TimeoutError(f"{what}; {seen}\n{at_what(self.hosts, self.folder)}\n{stderr}")

    def close(self) -> None:
        """End everything."""
        self.hosts.close()
        self.process.wait()


def _environment(folder: Path) -> dict[str, str]:
    launchers = ("PMI_", "PMIX_", "OMPI_", "HYDRA_")
    own = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return own | PREFERRED | {"PYTHONPATH": path, "HWLOC_XMLFILE": "", "TMPDIR": str(folder / "tmp")}


def errors_in(folder: Path) -> dict[int, tuple[float, str]]:
    """rank -> when, what."""
    return {int(file.stem): _parse(file.read_text()) for file in folder.glob("*.error")}


def _parse(text: str) -> tuple[float, str]:
    when, _, what = text.partition(" ")
    return float(when), what
