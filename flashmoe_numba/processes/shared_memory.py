"""How much of the machine's shared memory is claimed: asked before ranks start, and before their segments are made.

A file there has its size at once and takes memory as it is touched, and whoever touches a page that is not there any
more dies. So what is left is what the system calls free, less what the files that are there have claimed and not
touched yet: those with a name, and those that only an open descriptor of a process holds. Segments of this package are
of the second kind, so a process that dies leaves nothing behind. `flashmoe run` claims for its ranks before they start,
by an empty file of the size that they will need.

Not seen: files without a name that another user's processes, or those of another container, hold.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

FOLDER = Path("/dev/shm")
CLAIM_VARIABLE = "FLASHMOE_CLAIM"  # path of what `flashmoe run` has claimed for these ranks
LOCK_PATIENCE_S = 10.0
LOCK_NAP_S = 0.005
BLOCK_BYTES = 512  # the unit of st_blocks
MIB = 2**20


class Shortage(ValueError):
    """There is not enough shared memory."""


def shortage(needed: int, who: str, cure: str, folder: Path = FOLDER) -> Shortage | None:
    """The error that says so, if `needed` bytes are more than what is left; None if they fit.

    Args:
        who: needs them, for instance "the ranks need".
        cure: what to do about it.
    """
    if not folder.is_dir():
        return None
    status = os.statvfs(folder)
    if status.f_blocks == 0:  # a tmpfs without a limit
        return None
    free, claimed = status.f_bavail * status.f_frsize, untouched_bytes(folder)
    left = max(0, free - claimed)
    if needed <= left:
        return None
    others = f" ({free / MIB:.0f} MiB are free, but others have claimed {claimed / MIB:.0f} MiB)" if claimed else ""
    return Shortage(f"{who} {needed / MIB:.0f} MiB of {folder}, which has {left / MIB:.0f} MiB left{others}: {cure}")


def untouched_bytes(folder: Path) -> int:
    """What the files in `folder`, with and without names, may still grow by when they are touched."""
    return sum(max(0, file.st_size - file.st_blocks * BLOCK_BYTES) for file in _files(folder))


def _files(folder: Path) -> Iterable[os.stat_result]:
    """Each once."""
    return {(file.st_dev, file.st_ino): file for file in (*_named(folder), *_open(folder))}.values()


def _named(folder: Path) -> Iterator[os.stat_result]:
    for parent, _, names in os.walk(folder):
        for name in names:
            yield from _regular(Path(parent, name))


def _open(folder: Path) -> Iterator[os.stat_result]:
    """Without a name any more, but open in a process that we may look into."""
    device, inside = folder.stat().st_dev, f"{folder.resolve()}/"
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # another user's, or gone
            for descriptor in os.scandir(process / "fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(descriptor.path).startswith(inside):
                        yield from (file for file in _regular(Path(descriptor.path)) if file.st_dev == device)


def _regular(path: Path) -> Iterator[os.stat_result]:
    with contextlib.suppress(OSError):
        status = path.stat()
        if stat.S_ISREG(status.st_mode):
            yield status


def claim(descriptor: int, num_bytes: int, who: str, cure: str, folder: Path = FOLDER) -> Shortage | None:
    """Give the empty file `descriptor` a size of `num_bytes`, if they are left; else the error that says so.

    One process at a time looks and claims, so that no two are given the same memory. What was kept for this process,
    see `claimed`, counts as left, and is kept no longer.
    """
    with _locked(folder):
        _let_go_of_what_was_kept(folder)
        error = shortage(num_bytes, who, cure, folder)
        if error is None:
            os.ftruncate(descriptor, num_bytes)
        return error


@contextlib.contextmanager
def claimed(num_bytes: int, who: str, cure: str, folder: Path = FOLDER) -> Iterator[None]:
    """While this lasts `num_bytes` are kept for the processes that are started in it, until one of them claims.

    Raises:
        Shortage: they are not there.
    """
    if not folder.is_dir():
        yield
        return
    with tempfile.TemporaryFile(dir=folder) as file:  # without a name, so that nothing is left if we are killed
        error = claim(file.fileno(), num_bytes, who, cure, folder)
        if error is not None:
            raise error
        os.environ[CLAIM_VARIABLE] = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        try:
            yield
        finally:
            os.environ.pop(CLAIM_VARIABLE, None)


def _let_go_of_what_was_kept(folder: Path) -> None:
    path = os.environ.pop(CLAIM_VARIABLE, None)
    if path is None:
        return
    with contextlib.suppress(OSError):  # whoever kept it is gone
        status = os.stat(path)
        is_here = status.st_nlink == 0 and status.st_dev == folder.stat().st_dev
        if is_here and status.st_blocks == 0:  # it is no other file by now: segments are touched as they are made
            os.truncate(path, 0)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The folder itself is the lock: it needs no file, lets all users in, and opens when its holder dies."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        limit = time.monotonic() + LOCK_PATIENCE_S
        while not _try_lock(descriptor):
            if time.monotonic() > limit:
                raise TimeoutError(f"another process has kept {folder} locked for {LOCK_PATIENCE_S:g} s")
            time.sleep(LOCK_NAP_S)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    import fcntl  # not everywhere where the simulator runs

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
