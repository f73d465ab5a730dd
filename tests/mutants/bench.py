"""A copy of the project in which mutants are tried, one at a time; the project itself is never edited."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from .rules import Mutant
from .suites import Stage

OWNER = "FLASHMOE_MUTANTS_BENCH"  # in the environment of all that a bench starts


HUNG = "took too long"


class Verdict(NamedTuple):
    killed_by: str  # the test that failed, HUNG, or "" if none did
    seconds: float


class Bench:
    """A copy of `root`, whose tests are run with compiled kernels kept in `cache`."""

    def __init__(self, root: Path, folder: Path, cache: Path) -> None:
        self.folder = folder
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=root, check=True, capture_output=True, text=True,
        )  # fmt: skip
        for name in filter(None, listed.stdout.split("\0")):
            if (root / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, folder / name)
        self._env = os.environ | {
            OWNER: str(folder),
            "PYTHONPATH": str(folder),
            "FLASHMOE_CACHE_DIR": str(cache),
            "HYPOTHESIS_PROFILE": "mutants",
            "PYTHONHASHSEED": "0",
        }
        self._stamps = itertools.count(int(time.time()) + 1)

    def check(self, stage: Stage) -> Verdict:
        """The stage without a mutant: nothing should fail."""
        return self._run(stage, None)

    def judge(self, mutant: Mutant, limits_s: dict[Stage, float]) -> Verdict:
        """Run the stages until one notices the mutant, each for so long at most."""
        file = self.folder / mutant.file
        original = file.read_bytes()
        start = time.monotonic()
        try:
            self._write(file, mutant.edited(original))
            runs = (self._run(stage, limit_s) for stage, limit_s in limits_s.items())
            killed_by = next((run.killed_by for run in runs if run.killed_by), "")
        finally:
            self._write(file, original)
        return Verdict(killed_by, time.monotonic() - start)

    def _write(self, file: Path, text: bytes) -> None:
        """With a time of change of its own, by which Python knows that its bytecode is old."""
        file.write_bytes(text)
        stamp = next(self._stamps)
        os.utime(file, (stamp, stamp))

    def _run(self, stage: Stage, limit_s: float | None) -> Verdict:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no", "-rfE"]
        start = time.monotonic()
        with tempfile.TemporaryFile("w+", errors="replace") as output:  # not a pipe: what is left behind may hold it
            process = subprocess.Popen(
                [*command, *stage.tests.split()], cwd=self.folder, env=self._env, start_new_session=True,
                stdout=output, stderr=output,
            )  # fmt: skip
            try:
                process.wait(limit_s)
                output.seek(0)
                killed_by = first_failure(output.read(), process.returncode)
            except subprocess.TimeoutExpired:
                killed_by = HUNG
            finally:
                self.stop()
                process.wait()
        return Verdict(killed_by, time.monotonic() - start)

    def stop(self) -> None:
        """End what a run started and left behind, in sessions of their own too."""
        mark = f"{OWNER}={self.folder}\0".encode()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (process / "environ").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)


def first_failure(output: str, status: int) -> str:
    """The test that failed; or what pytest said last, where it died."""
    if status == 0:
        return ""
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    return found[1] if found else f"status {status}: {output.strip()[-200:]}"
