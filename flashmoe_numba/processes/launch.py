"""Ranks as processes: how they are started, and how they end together.

`start` runs a command on n ranks of this machine, or of several hosts, under mpirun, whatever a batch system says of
other machines, and ends it if ranks do not begin. Each rank is the child of a guard, a small shell: mpirun ends all
ranks as soon as it sees one die, before the others can say what they waited for, so the guard of a rank that was killed
waits until they should have. Whoever dies takes its children along: mpirun ends the guards, a rank dies with its guard,
and mpirun with whoever started it. Linux; elsewhere the last two are left out.

A rank begins with Ctrl-C ignored: an interrupt while MPI starts would leave its shared memory behind. `answer_ctrl_c`
ends that.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from . import shared_memory
from .mpi_environment import RANK_VARIABLES, find_mpirun, has_launcher, rank_variable
from .netmod import PREFERRED
from .relay import Relay, mark, writer_to

if TYPE_CHECKING:
    from .destinations import Destinations

COMMAND_VARIABLE = "FLASHMOE_RANK_COMMAND"  # not in the guards' arguments, so that these do not look like ranks
TERMINAL_VARIABLE = "FLASHMOE_TERMINAL"  # stderr of a rank is a pipe; this says that it ends at a terminal
MARKS_VARIABLE = "FLASHMOE_MARKS"  # that each guard, and each rank once all have begun, is to leave a mark (relay.py)
GUARD = """trap '' INT
[ -z "$FLASHMOE_MARKS" ] || printf '\\036g' >&2
eval "$FLASHMOE_RANK_COMMAND"
code=$?
if [ $code -ge 128 ] && [ $code -ne 130 ]; then
    echo "flashmoe: rank ${PMI_RANK:-${PMIX_RANK:-$OMPI_COMM_WORLD_RANK}} was killed, status $code" >&2
    sleep "$0"
fi
exit $code"""
STARTUP_BYTES = 1_100_000  # of mpich's own there, for each rank
STOP_PATIENCE_S = 1.5
START_PATIENCE_S = 120.0  # with no further rank, for each 64 of them: on few cores all import Numba first
START_NAP_S = 0.02
START_HERE = {"HYDRA_LAUNCHER": "fork", "HYDRA_RMK": "user"}  # mpich's; by Slurm's variables it would wait for srun
ELSEWHERE = ("HYDRA_HOST_FILE", "HYDRA_LAUNCHER_AUTOFORK", "HYDRA_LAUNCHER_EXTRA_ARGS")
PR_SET_PDEATHSIG = 1


def inside_mpirun() -> bool:
    """Is this process a rank that mpirun or a like launcher started? Known without touching MPI."""
    return rank_variable() is not None


def started_by_us() -> bool:
    """Has `start` started this rank, which has not begun yet (see `guard_this_rank`)?"""
    return COMMAND_VARIABLE in os.environ


def is_first_rank() -> bool:
    """Is this rank 0, or no rank of a launcher? Who only seems to be another one must not be silent."""
    return not has_launcher() or all((os.environ.get(name) or "0") == "0" for name in RANK_VARIABLES)


def start(
    num_ranks: int,
    command: list[str],
    deadline_s: float,
    hosts: Destinations | None = None,
    write: Callable[[bytes], object] | None = None,
) -> int:
    """Run `command` as each of `num_ranks` ranks; returns mpirun's exit status, 130 after Ctrl-C, 143 after SIGTERM.

    Args:
        hosts: where they run, as many on each, in a folder of this one's name; None: all on this machine.
        write: takes what they say on stdout; None: it goes to ours.

    Raises:
        KeyboardInterrupt: by Ctrl-C before MPI had begun: ranks did not hear of it.
        TimeoutError: no further rank began for `START_PATIENCE_S`.
        UsageError: mpirun or mpi4py is missing.
    """
    mpirun = find_mpirun()
    where = [] if hosts is None else hosts.flags(num_ranks)
    with _sigterm_as_exit():
        process = subprocess.Popen(
            [mpirun, *where, "-n", str(num_ranks), *_guard(deadline_s)],
            env=_environment(command, hosts),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a terminal's Ctrl-C comes here once, and mpirun gets it from here once
            preexec_fn=functools.partial(_die_with_parent, signal.SIGTERM),
        )
        assert process.stdout is not None and process.stderr is not None
        said = Relay(process.stdout, write or writer_to(1)), Relay(process.stderr, writer_to(2))
        before, code = _startup_segments(), 1
        try:
            code = _wait(process, said, lambda: _wait_for_ranks(process, said[1], num_ranks, hosts))
        finally:
            for relay in said:
                relay.end()
            if code != 0:
                _remove_unmapped(before)
    return code


def _wait_for_ranks(process: subprocess.Popen[bytes], said: Relay, num_ranks: int, hosts: Destinations | None) -> None:
    """Until MPI has begun in all ranks, or mpirun is over; as long as further ones come."""
    patience_s = START_PATIENCE_S * -(-num_ranks // 64)
    seen, since = "", time.monotonic()
    while process.poll() is None and seen.count("r") < num_ranks:
        if said.marks != seen:
            seen, since = said.marks, time.monotonic()
        elif time.monotonic() - since > patience_s:
            far = f"{seen.count('g')} of {num_ranks} ranks started, MPI began in {seen.count('r')}"
            raise TimeoutError(f"{find_mpirun()} was ended: {far}, and no more for {patience_s:g} s: {_cure(hosts)}")
        time.sleep(START_NAP_S)


def _cure(hosts: Destinations | None) -> str:
    """What to do about ranks that do not begin."""
    if hosts is None:
        return "see what `flashmoe doctor` says of mpirun, or run all ranks in one process with --threads"
    there = ", ".join(hosts.names)
    return f"see whether {hosts.launcher} starts programs on {there}, and whether these reach each other on all ports"


def tell_begun() -> None:
    """MPI has begun in all ranks: tell whoever has started this one."""
    if os.environ.pop(MARKS_VARIABLE, None):
        mark("r")


def _startup_segments() -> set[Path]:
    """mpich's own files in shared memory that still have names."""
    return set(shared_memory.FOLDER.glob("mpich_shm_*"))


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


def _environment(command: list[str], hosts: Destinations | None) -> dict[str, str]:
    """What mpirun and the ranks get; the user's own settings win, but for those that lead to other machines."""
    defaults = PREFERRED | {  # mpich's start-up segment is small then, too: 1 MB per rank instead of 5
        "HWLOC_XMLFILE": "",  # or mpirun leaves files in /tmp when it is interrupted
        TERMINAL_VARIABLE: "1" if sys.stderr.isatty() else "",
        MARKS_VARIABLE: "1",
    }
    not_own = ELSEWHERE if hosts is None else ELSEWHERE[:1]
    own = {name: value for name, value in os.environ.items() if name not in not_own}
    where = START_HERE if hosts is None else {"HYDRA_RMK": "user"}
    return defaults | own | where | path_of_package() | {COMMAND_VARIABLE: shlex.join(command)}


def path_of_package() -> dict[str, str]:
    """Ranks look for modules in the caller's folder no more (`python -P`), where this package may lie uninstalled."""
    root = str(Path(__file__).parents[2])
    if root in sys.path[1:]:
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), root]))}


def _guard(deadline_s: float) -> list[str]:
    """The others may be at work for a while before their silence begins, and end all as soon as it is too long."""
    return ["/bin/sh", "-c", GUARD, f"{2 * deadline_s + 5:g}"]


def shared_memory_for(num_ranks: int, segment_bytes: int) -> AbstractContextManager[None]:
    """While it lasts the ranks' segments have their place. The system never looks, and ranks would die at a touch.

    Raises:
        Shortage: naming what is needed and what there is.
    """
    return shared_memory.claimed(*_need(num_ranks, segment_bytes))


def shared_memory_shortage(num_ranks: int, segment_bytes: int) -> shared_memory.Shortage | None:
    """Would they have it now?"""
    return shared_memory.shortage(*_need(num_ranks, segment_bytes))


def _need(num_ranks: int, segment_bytes: int) -> tuple[int, str, str]:
    cure = "use fewer --tokens, a --capacity, or --threads"
    return shared_memory_bytes(num_ranks, segment_bytes), "the ranks need", cure


def shared_memory_bytes(num_ranks: int, segment_bytes: int) -> int:
    """What ranks as processes take of it at most, MPI's own included."""
    return num_ranks * (segment_bytes + STARTUP_BYTES)


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


def _wait(process: subprocess.Popen[bytes], said: Sequence[Relay], begin: Callable[[], None]) -> int:
    try:
        begin()
        code = process.wait()
        return code if code >= 0 else 128 - code
    except KeyboardInterrupt:
        ranks_hear = "r" in said[1].marks  # and say so
        _stop(process, said)
        if not ranks_hear:
            raise
        return 128 + signal.SIGINT
    except BaseException:
        _stop(process, said)
        raise


def _stop(process: subprocess.Popen[bytes], said: Sequence[Relay]) -> None:
    """Interrupt mpirun, then insist; another Ctrl-C makes it insist at once."""
    for relay in said:
        relay.interrupted = True
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.send_signal(signum)
            process.wait(STOP_PATIENCE_S)
            return
