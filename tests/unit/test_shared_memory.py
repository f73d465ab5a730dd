"""Shared memory is claimed before it is touched: by live files, with names and without, of this and other processes."""

import bisect
import contextlib
import fcntl
import os
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from flashmoe_numba.processes import shared_memory
from flashmoe_numba.processes.shared_memory import MIB, Shortage, claim, claimed, shortage, untouched_bytes

ROOT = Path(__file__).resolve().parents[2]
HERE = ("the ranks need", "use fewer")


@pytest.fixture
def folder(monkeypatch):
    """A folder of 64 MiB in which files take memory as they are touched."""
    parent = shared_memory.FOLDER if shared_memory.FOLDER.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="flashmoe_test_", dir=parent) as name:
        path = Path(name)

        def room(_):
            touched = sum(status.st_blocks * 512 for status in shared_memory._files(path))
            return SimpleNamespace(f_bavail=(64 * MIB - touched) // 4096, f_frsize=4096, f_blocks=64 * MIB // 4096)

        monkeypatch.setattr(shared_memory.os, "statvfs", room)
        yield path


@contextlib.contextmanager
def file_of(folder, num_bytes, touched=0):
    """Without a name, as segments are."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(num_bytes)
        file.write(b"1" * touched)
        file.flush()
        yield file


def left(folder):
    """The most MiB that are not refused."""
    return bisect.bisect_left(range(65), True, key=lambda mib: shortage(mib * MIB, *HERE, folder) is not None) - 1


def test_what_is_claimed_and_not_touched_is_not_left(folder, tmp_path):
    assert left(folder) == 64
    (folder / "named").write_bytes(b"1" * MIB)
    os.truncate(folder / "named", 8 * MIB)
    with file_of(folder, 20 * MIB, touched=5 * MIB) as file:
        assert untouched_bytes(folder) == (7 + 15) * MIB
        assert left(folder) == 64 - 8 - 20
        (tmp_path / "link").symlink_to(folder)
        assert left(tmp_path / "link") == 64 - 8 - 20
        with open(f"/proc/self/fd/{file.fileno()}", "rb"):  # the same file twice
            assert left(folder) == 64 - 8 - 20
        file.write(b"1" * 15 * MIB)  # it takes what it has claimed
        file.flush()
        assert left(folder) == 64 - 8 - 20
    os.link(folder / "named", folder / "again")
    assert left(folder) == 64 - 8


def test_files_of_other_processes_count_until_they_end(folder):
    program = (
        f"import tempfile; f = tempfile.TemporaryFile(dir={str(folder)!r}); f.truncate({30 * MIB}); print(); input()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert left(folder) == 34
        other.kill()
    assert left(folder) == 64


def test_the_error_says_what_is_needed_left_and_claimed(folder):
    with file_of(folder, 40 * MIB):
        assert str(shortage(25 * MIB, *HERE, folder)) == (
            f"the ranks need 25 MiB of {folder}, which has 24 MiB left "
            "(64 MiB are free, but others have claimed 40 MiB): use fewer"
        )


def test_a_folder_without_a_limit_and_none_at_all_have_room(folder, monkeypatch):
    unlimited = SimpleNamespace(f_bavail=0, f_frsize=4096, f_blocks=0)
    monkeypatch.setattr(shared_memory.os, "statvfs", lambda _: unlimited)
    assert shortage(2**50, *HERE, folder) is None
    assert shortage(2**50, *HERE, folder / "none") is None


@pytest.mark.parametrize("sizes", [[40, 40], [16] * 5, [1, 64], [30, 35, 34]])
def test_claims_that_together_are_too_large_are_refused_when_they_are(folder, sizes):
    with contextlib.ExitStack() as stack:
        taken = 0
        for size in sizes:
            file = stack.enter_context(tempfile.TemporaryFile(dir=folder))
            error = claim(file.fileno(), size * MIB, *HERE, folder)
            assert isinstance(error, ValueError) == (taken + size > 64), f"{size} MiB after {taken}"
            assert os.fstat(file.fileno()).st_size == (0 if error else size * MIB)
            taken += 0 if error else size


def test_of_many_that_claim_at_once_as_many_pass_as_fit(folder, monkeypatch):
    gate, passed = threading.Barrier(8), []

    def one():
        with tempfile.TemporaryFile(dir=folder) as file:
            gate.wait()
            passed.append(claim(file.fileno(), 20 * MIB, *HERE, folder) is None)
            gate.wait()

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(passed) == 3


def test_a_lock_that_is_kept_is_an_error_after_a_while(folder, monkeypatch):
    monkeypatch.setattr(shared_memory, "LOCK_PATIENCE_S", 0.05)
    holder = os.open(folder, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    with file_of(folder, 0) as file:
        with pytest.raises(TimeoutError, match=re.escape(f"{folder} locked for 0.05 s")):
            claim(file.fileno(), MIB, *HERE, folder)
        os.close(holder)
        assert claim(file.fileno(), MIB, *HERE, folder) is None


def test_what_a_launcher_keeps_is_for_its_ranks_only(folder, monkeypatch):
    with claimed(40 * MIB, *HERE, folder):
        with monkeypatch.context() as elsewhere, file_of(folder, 0) as file:
            elsewhere.delenv(shared_memory.CLAIM_VARIABLE)
            with pytest.raises(Shortage, match="others have claimed 40 MiB"):
                claimed(40 * MIB, *HERE, folder).__enter__()
            assert claim(file.fileno(), 25 * MIB, *HERE, folder) is not None
        assert left(folder) == 24
        with file_of(folder, 0) as segments:
            assert claim(segments.fileno(), 38 * MIB, *HERE, folder) is None, "this process counts as a rank"
            assert left(folder) == 64 - 38
            with file_of(folder, 0) as second_layer:
                assert claim(second_layer.fileno(), 38 * MIB, *HERE, folder) is not None
    assert shared_memory.CLAIM_VARIABLE not in os.environ
    assert (left(folder), os.listdir(folder)) == (64, [])


def test_a_path_that_is_no_claim_any_more_is_left_alone(folder, monkeypatch, tmp_path):
    (tmp_path / "mine").write_text("precious")
    (folder / "mine").write_text("precious")
    with (
        file_of(tmp_path, 0, touched=8) as unnamed,
        file_of(folder, 0, touched=8) as others,
        file_of(folder, 0) as segments,
    ):
        unnamed_paths = [Path(f"/proc/self/fd/{file.fileno()}") for file in (unnamed, others)]
        paths = [tmp_path / "mine", folder / "mine", *unnamed_paths]
        for path in paths:
            monkeypatch.setenv(shared_memory.CLAIM_VARIABLE, str(path))
            assert claim(segments.fileno(), MIB, *HERE, folder) is None
        assert [path.stat().st_size for path in paths] == [8] * 4
