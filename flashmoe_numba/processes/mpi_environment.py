"""What the environment says of MPI before MPI itself is asked, and what to tell users where the two do not fit.

A launcher tells its ranks who they are by variables. Another MPI's mpirun sets other ones, and variables can be left
over from a shell that a rank had started: MPI then aborts without a word that helps, or each process is alone with it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import stat
import sys
import sysconfig
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .machine import machine_name
from .netmod import prefer_surviving

RANK_VARIABLES = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")
SIZE_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")
CONNECTION_VARIABLE = "PMI_FD"  # a socket to mpich's mpirun
LAUNCHER_VARIABLES = (CONNECTION_VARIABLE, "PMI_PORT", "PMIX_NAMESPACE", "OMPI_COMM_WORLD_SIZE")
VARIABLES = tuple(dict.fromkeys((*RANK_VARIABLES, *SIZE_VARIABLES, *LAUNCHER_VARIABLES)))  # that make a rank of us
NOT_OF_MPICH = "OMPI_COMM_WORLD_RANK"
SPLITTING_VARIABLES = ("MPIR_CVAR_NOLOCAL", "MPIR_CVAR_NUM_CLIQUES", "MPIR_CVAR_ODD_EVEN_CLIQUES")


def rank_variable() -> str | None:
    """The variable by which this process takes itself for a rank, if it does."""
    return next((name for name in RANK_VARIABLES if os.environ.get(name)), None)


def has_launcher() -> bool:
    """Does a launcher stand behind the rank's variable? Else it may be left over."""
    return any(os.environ.get(name) for name in LAUNCHER_VARIABLES)


def mpirun_beside() -> str | None:
    """The mpirun of this Python's environment, which need not be activated."""
    folders = [Path(sys.executable).parent, Path(sysconfig.get_path("scripts"))]
    return next((str(folder / "mpirun") for folder in folders if (folder / "mpirun").is_file()), None)


def find_mpirun() -> str:
    """The mpirun beside this Python, else that on the PATH.

    Raises:
        UsageError: there is none, or no mpi4py.
    """
    found = mpirun_beside() or shutil.which("mpirun")
    missing = [name for name, there in (("mpirun", found), ("mpi4py", importlib.util.find_spec("mpi4py"))) if not there]
    if found is None or missing:
        hint = "pip install 'flashmoe-numba[mpi]', or run all ranks in one process with --threads"
        raise UsageError(f"ranks as processes need {' and '.join(missing)}, not found here: {hint}")
    return found


def begin_mpi() -> Any:
    """mpi4py's `MPI`, begun, for calls from several threads.

    Raises:
        UsageError: whoever set this rank's variables is not the mpirun of this MPI, ranks of one machine share no
            memory, or threads may not call this MPI.
    """
    import mpi4py

    mpi4py.rc.initialize, mpi4py.rc.finalize = False, True  # so that its maker can be asked first
    from mpi4py import MPI

    vendor = MPI.get_vendor()[0]
    if not MPI.Is_initialized():
        _raise_if_strange(strange_variable(vendor), vendor)
        prefer_surviving()
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
    _raise_if_strange(lonely_variable(MPI.COMM_WORLD.size), vendor)
    _check_machines(MPI)
    return MPI


def strange_variable(vendor: str) -> str | None:
    """The variable on which MPI would abort as it begins."""
    if vendor != "MPICH":
        return None
    if NOT_OF_MPICH in os.environ:
        return NOT_OF_MPICH
    if "PMIX_RANK" in os.environ and not has_launcher():
        return "PMIX_RANK"
    connection = os.environ.get(CONNECTION_VARIABLE)
    return CONNECTION_VARIABLE if connection is not None and not _is_socket(connection) else None


def _is_socket(descriptor: str) -> bool:
    with contextlib.suppress(OSError, ValueError, OverflowError):
        return stat.S_ISSOCK(os.fstat(int(descriptor)).st_mode)
    return False


def lonely_variable(num_ranks: int) -> str | None:
    """The variable that promises more ranks than the one that MPI knows of."""
    sizes = {name: os.environ[name] for name in SIZE_VARIABLES if name in os.environ}
    return next((name for name, size in sizes.items() if num_ranks == 1 and size != "1"), None)


def _raise_if_strange(name: str | None, vendor: str) -> None:
    if name is not None:
        raise UsageError(say_strange(name, vendor))


def say_strange(name: str, vendor: str) -> str:
    """What to do about a variable that does not come from the mpirun of this MPI."""
    mpirun = mpirun_beside() or f"the mpirun of {vendor}"
    left = " ".join(name for name in (*RANK_VARIABLES, *SIZE_VARIABLES, CONNECTION_VARIABLE) if name in os.environ)
    origin = f"{name}={os.environ[name]} in the environment is not of an mpirun of {vendor}, which mpi4py uses"
    return f"{origin}: start ranks by {mpirun}, or unset {left} if left over"


def why_alone(num_ranks: int) -> str:
    """To add to an error about a communicator of one rank where `num_ranks` were meant."""
    name = lonely_variable(1)
    if name is not None:
        from mpi4py import MPI

        return f": {say_strange(name, MPI.get_vendor()[0])}"
    return f": start {num_ranks} ranks by {mpirun_beside() or 'mpirun'} -n {num_ranks}"


def unless_left_over(num_ranks: int) -> str:
    """To add to an error about being a rank, where it is the only one."""
    name = rank_variable()
    return f"; {name} in the environment makes this a rank: unset it if left over" if num_ranks == 1 else ""


def _check_machines(MPI: Any) -> None:
    """That ranks share memory where they share a machine, and that messages may come from threads where they do not."""
    local = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
    num_local, num_ranks = local.size, MPI.COMM_WORLD.size
    local.Free()
    names = MPI.COMM_WORLD.allgather(machine_name())
    num_here = names.count(machine_name())
    if num_local != num_here:
        blamed = [name for name in SPLITTING_VARIABLES if name in os.environ]
        cure = f": unset {', '.join(blamed)}" if blamed else ""
        raise UsageError(f"all ranks of a machine must share its memory, but only {num_local} of {num_here} do{cure}")
    if num_here != num_ranks and MPI.Query_thread() != MPI.THREAD_MULTIPLE:
        raise UsageError("ranks on several hosts need an MPI that threads may call: it does not give THREAD_MULTIPLE")
