"""Ranks as processes: how they are started, and how they end together.

`start` runs a command on n ranks under mpirun. Each rank is the child of a guard, a small shell: mpirun ends all ranks
as soon as it sees one die, before the others can say what they waited for, so the guard of a rank that was killed
waits until they should have. Whoever dies takes its children along: mpirun ends the guards, a rank dies with
its guard, and mpirun with whoever started it. Linux; elsewhere the last two are left out.

A rank begins with Ctrl-C ignored: an interrupt while MPI starts would leave its shared memory behind. `answer_ctrl_c`
ends that.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from ..commands import UsageError

RANK_VARIABLES = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")
COMMAND_VARIABLE = "FLASHMOE_RANK_COMMAND"  # not in the guards' arguments, so that these do not look like ranks
TERMINAL_VARIABLE = "FLASHMOE_TERMINAL"  # stderr of a rank is a pipe; this says that it ends at a terminal
GUARD = """trap '' INT
eval "$FLASHMOE_RANK_COMMAND"
code=$?
if [ $code -ge 128 ] && [ $code -ne 130 ]; then
    echo "flashmoe: rank ${PMI_RANK:-${PMIX_RANK:-$OMPI_COMM_WORLD_RANK}} was killed, status $code" >&2
    sleep "$0"
fi
exit $code"""
SHARED_MEMORY = "/dev/shm"
STARTUP_BYTES = 1.1e6  # of mpich's own there, for each rank
STOP_PATIENCE_S = 1.5
PR_SET_PDEATHSIG = 1


def inside_mpirun() -> bool:
    """Is this process a rank that mpirun or a like launcher started? Known without touching MPI."""
    return any(name in os.environ for name in RANK_VARIABLES)


def is_first_rank() -> bool:
    """Is this rank 0, or no rank at all?"""
    return all(os.environ.get(name, "0") == "0" for name in RANK_VARIABLES)


def start(num_ranks: int, command: list[str], deadline_s: float) -> int:
    """Run `command` as each of `num_ranks` ranks; returns mpirun's exit status, 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        UsageError: mpirun or mpi4py is missing.
    """
    mpirun = find_mpirun()
    process = subprocess.Popen(
        [mpirun, "-n", str(num_ranks), *_guard(deadline_s)],
        env=_environment(command),
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # a terminal's Ctrl-C comes here once, and mpirun gets it from here once
        preexec_fn=functools.partial(_die_with_parent, signal.SIGTERM),
    )
    before = _startup_segments()
    with _sigterm_as_exit():
        try:
            code = _wait(process)
        except BaseException:
            _remove_unmapped(before)
            raise
    if code != 0:
        _remove_unmapped(before)
    return code


def _startup_segments() -> set[Path]:
    """mpich's own files in shared memory that still have names."""
    return set(Path(SHARED_MEMORY).glob("mpich_shm_*"))


def _remove_unmapped(before: set[Path]) -> None:
    """Remove what ranks that were ended while MPI started have left: new files of ours that no process maps."""
    left = _startup_segments() - before
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # another user's, or gone
            mapped = maps.read_text()
            left = {path for path in left if str(path) not in mapped}
    for path in left:
        with contextlib.suppress(OSError):
            if path.stat().st_uid == os.getuid():
                path.unlink()


def _environment(command: list[str]) -> dict[str, str]:
    """What mpirun and the ranks get; the user's own settings win."""
    defaults = {
        "MPIR_CVAR_CH4_NETMOD": "ofi",  # mpich's small start-up segment: 1 MB per rank instead of 5
        "HWLOC_XMLFILE": "",  # or mpirun leaves files in /tmp when it is interrupted
        TERMINAL_VARIABLE: "1" if sys.stderr.isatty() else "",
    }
    return defaults | os.environ | {COMMAND_VARIABLE: shlex.join(command)}


def _guard(deadline_s: float) -> list[str]:
    """The others may be at work for a while before their silence begins, and end all as soon as it is too long."""
    return ["/bin/sh", "-c", GUARD, f"{2 * deadline_s + 5:g}"]


def find_mpirun() -> str:
    """The mpirun of this Python's environment, which need not be activated, else that on the PATH.

    Raises:
        UsageError: there is none, or no mpi4py.
    """
    folders = [Path(sys.executable).parent, Path(sysconfig.get_path("scripts"))]
    beside = [str(folder / "mpirun") for folder in folders if (folder / "mpirun").is_file()]
    found = beside[0] if beside else shutil.which("mpirun")
    missing = [name for name, there in (("mpirun", found), ("mpi4py", importlib.util.find_spec("mpi4py"))) if not there]
    if found is None or missing:
        hint = "pip install 'flashmoe-numba[mpi]', or run all ranks in one process with --threads"
        raise UsageError(f"ranks as processes need {' and '.join(missing)}, not found here: {hint}")
    return found


def check_shared_memory(num_ranks: int, segment_bytes: int) -> None:
    """Nothing, if the ranks' segments fit. MPI itself never looks, and ranks would die at the first touch.

    Raises:
        UsageError: naming what is needed and what there is.
    """
    if os.path.isdir(SHARED_MEMORY):
        status = os.statvfs(SHARED_MEMORY)
        needed, free = num_ranks * (segment_bytes + STARTUP_BYTES) / 2**20, status.f_bavail * status.f_frsize / 2**20
        if needed > free:
            cure = "use fewer --tokens, a --capacity, or --threads"
            raise UsageError(
                f"the ranks need {needed:.0f} MiB of {SHARED_MEMORY}, which has {free:.0f} MiB left: {cure}"
            )


def guard_this_rank(deadline_s: float) -> None:
    """In a rank that a user's own mpirun started: begin again as the child of a guard. Under a guard: die with it."""
    if os.environ.pop(COMMAND_VARIABLE, None) is None:
        os.environ[COMMAND_VARIABLE] = shlex.join([sys.executable, *sys.orig_argv[1:]])
        sys.stdout.flush()
        os.execv("/bin/sh", _guard(deadline_s))
    guard = os.getppid()
    _die_with_parent(signal.SIGKILL)
    if os.getppid() != guard:  # it died before we could ask
        os.kill(os.getpid(), signal.SIGKILL)


def answer_ctrl_c() -> None:
    """From here on Ctrl-C ends this rank as usual."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _die_with_parent(signum: int) -> None:
    """Have the kernel send `signum` to this process when its parent is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signum)


@contextlib.contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    def leave(*_: object) -> NoReturn:
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _wait(process: subprocess.Popen[bytes]) -> int:
    try:
        code = process.wait()
        return code if code >= 0 else 128 - code
    except KeyboardInterrupt:
        _stop(process)
        return 128 + signal.SIGINT
    except BaseException:
        _stop(process)
        raise


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt mpirun, then insist; another Ctrl-C makes it insist at once."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.send_signal(signum)
            process.wait(STOP_PATIENCE_S)
            return
