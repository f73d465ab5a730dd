"""The one folder of compiled code: where it is, which of its files are ours, and which of them go.

It serves the kernels of layers for CPUs and GPUs and the event loop of the simulator. Processes share it without locks:
every writer of a name writes the same, and any file may vanish at any time. It is dispensable: where it cannot be, a
warning says so, and compiled code lives as long as the process.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path

VARIABLE = "FLASHMOE_CACHE_DIR"
KEPT_DAYS, KEPT_BYTES = 30, 1 << 30  # unused for longer, and beyond that in all, files are removed
IN_USE_S = 3600  # a file used since then may be about to be loaded: it stays

STAMP = r"-[0-9a-f]{24}"
OF_NUMBA = rf"{STAMP}\.py\w+(?:\.\d+)?\.nb[ic]"
UNFINISHED = r"(?:\.tmp\.\w+)?"  # of a writer that was killed
KINDS = {  # what each of our files is called; the folder may hold others, which are left alone
    "CPU kernels (*.nbi, *.nbc)": re.compile(rf"(?!sim\.)[\w.]+{OF_NUMBA}{UNFINISHED}"),
    "GPU kernels (*.cubin, *.json)": re.compile(rf"sm_\w+-\w+-\w+{STAMP}\.(?:cubin|json){UNFINISHED}"),
    "GPU kernels as PTX (*.ptx)": re.compile(rf"sm_\w+-\w+-\w+{STAMP}\.ptx{UNFINISHED}"),
    "simulator (sim.*.nbi, *.nbc)": re.compile(rf"sim\.[\w.]+{OF_NUMBA}{UNFINISHED}"),
}


def cache_folder() -> Path:
    """Where compiled code is kept: $FLASHMOE_CACHE_DIR, else flashmoe-numba in the user's cache folder.

    Raises:
        OSError: the user has no home directory.
    """
    explicit = os.environ.get(VARIABLE)
    if explicit:
        return Path(explicit).absolute()
    users = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not users.is_absolute():  # a relative one is invalid, and to be ignored, by the XDG Base Directory rules
        users = _home() / ".cache"
    return users / "flashmoe-numba"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:
        raise FileNotFoundError(f"user {os.getuid()} has no home directory, and HOME is not set") from None


def try_folder(folder: Path) -> None:
    """Raise an OSError if files cannot be written there; makes the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(1))


def usable_cache_folder() -> Path:
    """`cache_folder()`; where that cannot be written, with one warning, a temporary one of this process."""
    try:
        return _usable(cache_folder())
    except OSError as error:
        return _temporary(str(error))


@cache
def _usable(folder: Path) -> Path:
    try:
        try_folder(folder)
        return folder
    except OSError as error:
        return _temporary(unusable(folder, error))


def unusable(folder: Path, error: Exception) -> str:
    """What to say; without the names of files, which differ by function."""
    return f"{folder} cannot be used ({getattr(error, 'strerror', None) or error})"


@cache
def _temporary(why: str) -> Path:
    warn_not_kept(f"{why}; {VARIABLE} names another folder")
    try:
        folder = tempfile.mkdtemp(prefix="flashmoe-numba-")
    except OSError:  # nothing at all can be written: code is kept nowhere
        return Path(os.devnull, "flashmoe-numba")
    atexit.register(_remove, folder, os.getpid())
    return Path(folder)


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked process comes here, too
        shutil.rmtree(folder, ignore_errors=True)


@cache  # once, while Numba's own handling of warnings makes Python forget which were shown
def warn_not_kept(why: str) -> None:
    """Say that compiled code is not kept, and why."""
    warnings.warn(f"compiled kernels are not kept: {why}", stacklevel=2)


def our_files(folder: Path) -> dict[str, list[Path]]:
    """Our files in a folder, by kind; none if there is no such folder."""
    files = sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []
    return {kind: [file for file in files if name.fullmatch(file.name)] for kind, name in KINDS.items()}


def note_use(files: Iterable[Path]) -> None:
    """Set the time of last access, which `remove_old` goes by; many file systems do not by themselves."""
    for file in files:
        with contextlib.suppress(OSError):  # somebody else's, or gone
            os.utime(file, ns=(time.time_ns(), file.stat().st_mtime_ns))


def remove_old(folder: Path) -> None:
    """Remove our files that nobody used for KEPT_DAYS, and beyond KEPT_BYTES those that were used longest ago."""
    found = []
    for file in (file for files in our_files(folder).values() for file in files):
        with contextlib.suppress(OSError):  # another process may remove the same
            status = file.stat()
            found.append((max(status.st_atime, status.st_mtime), status.st_size, file))
    now, total = time.time(), 0
    for used, size, file in sorted(found, reverse=True):
        total += size
        too_old, too_much = now - used > KEPT_DAYS * 86400, total > KEPT_BYTES and now - used > IN_USE_S
        if too_old or too_much:
            with contextlib.suppress(OSError):
                file.unlink()
