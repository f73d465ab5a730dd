"""The folder of compiled code: where it is, what becomes of it where it cannot be, and what goes when it is old."""

import errno
import os
import pwd
import tempfile
import time
from pathlib import Path

import pytest
from children import run_python

from reference import cache_folder as module
from reference.cache_folder import cache_folder, note_use, remove_old, usable_cache_folder

STAMP = "0123456789abcdef01234567"


@pytest.fixture
def nobody(monkeypatch):
    """A user without HOME and without an entry in the list of users."""

    def no_entry(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    for name in ("HOME", "XDG_CACHE_HOME", "FLASHMOE_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def once(monkeypatch, tmp_path):
    """Temporary folders are made in `tmp_path`, and this process has warned of nothing yet."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for cached in (module._usable, module._temporary, module.warn_not_kept):
        cached.cache_clear()


def usable_with_a_warning(match):
    """The folder, which is temporary and the same when asked again, when nothing more is said."""
    with pytest.warns(UserWarning, match=f"compiled kernels are not kept: {match}") as said:
        folder = usable_cache_folder()
    assert len(said) == 1
    assert usable_cache_folder() == folder
    return folder


def test_without_a_home_there_is_a_temporary_folder(nobody, once, tmp_path):
    with pytest.raises(OSError, match=f"user {os.getuid()} has no home directory, and HOME is not set"):
        cache_folder()
    folder = usable_with_a_warning("user .* has no home directory")
    assert folder.parent == tmp_path
    (folder / "file").write_text("can be written")


@pytest.mark.parametrize("variable", ["FLASHMOE_CACHE_DIR", "XDG_CACHE_HOME", "HOME"])
def test_a_folder_that_cannot_be_made(nobody, once, monkeypatch, tmp_path, variable):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(variable, str(tmp_path / "file"))
    folder = usable_with_a_warning(rf"{tmp_path / 'file'}.* cannot be used \(.*\); FLASHMOE_CACHE_DIR names another")
    assert folder.parent == tmp_path


def test_a_home_on_a_full_disk(once, monkeypatch, tmp_path):
    class Full(tempfile._TemporaryFileWrapper):
        def __init__(self, dir):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("FLASHMOE_CACHE_DIR", str(tmp_path / "full"))
    monkeypatch.setattr(tempfile, "TemporaryFile", Full)
    folder = usable_with_a_warning(rf"{tmp_path / 'full'} cannot be used \(No space left on device\)")
    assert folder != tmp_path / "full"


def test_nothing_at_all_can_be_written(nobody, once, monkeypatch):
    def nowhere(prefix):
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "mkdtemp", nowhere)
    assert not usable_with_a_warning("user .* has no home directory").exists()


def test_relative_names(nobody, monkeypatch, tmp_path):
    """XDG's rules have a relative XDG_CACHE_HOME ignored; our own variable is taken as the shell's folder means it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert cache_folder() == tmp_path / "home" / ".cache" / "flashmoe-numba"
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", "there")
    assert cache_folder() == tmp_path / "there"


def test_a_temporary_folder_goes_with_the_process_that_made_it(tmp_path):
    program = """if True:
        import os, sys, warnings
        from reference.cache_folder import usable_cache_folder
        warnings.simplefilter("ignore")
        folder = usable_cache_folder()
        if os.fork() == 0:
            sys.exit()  # runs what is to run at exit
        os.wait()
        assert folder.is_dir(), "a child removed it"
        print(folder)
    """
    done = run_python("-c", program, FLASHMOE_CACHE_DIR="/dev/null/none", TMPDIR=str(tmp_path))
    assert done.stdout.startswith(f"{tmp_path}/flashmoe-numba-"), done.stderr
    assert list(tmp_path.iterdir()) == []


# what is removed


def fill(folder, ages_days):
    """A file of 100 bytes for each (name, days since it was last used)."""
    for name, days in ages_days.items():
        (folder / name).write_bytes(bytes(100))
        os.utime(folder / name, times=(time.time() - days * 86400, time.time() - 100 * 86400))


def names(folder):
    return {file.name for file in folder.iterdir()}


def test_what_nobody_used_for_long_is_removed(tmp_path):
    stays = {
        f"flashmoe_numba.kernel.persistent.persistent-{STAMP}.py311.nbi": 29,
        f"sm_90a-float16-wgmma-{STAMP}.json": 1,
        "thesis.nbc": 99,
        f"x-{STAMP}.txt": 99,
    }
    goes = {
        f"persistent.persistent-{STAMP}.py311.1.nbc": 31,
        f"sim.engine.loop.loop-{STAMP}.py313t.nbi": 40,
        f"sm_80-float32-lanes-{STAMP}.cubin": 31,
        f"sm_80-float32-lanes-{STAMP}.cubin.tmp.0123456789abcdef": 31,
        f"sim.engine.loop.loop-{STAMP}.py311.1.nbc.tmp.0123456789abcdef": 31,
    }
    fill(tmp_path, stays | goes)
    (tmp_path / f"sim.engine.loop.start-{STAMP}.py311.nbi").mkdir()
    remove_old(tmp_path)
    assert names(tmp_path) == {*stays, f"sim.engine.loop.start-{STAMP}.py311.nbi"}


def test_a_file_that_is_used_stays(tmp_path):
    name = f"sim.engine.loop.loop-{STAMP}.py311.nbi"
    fill(tmp_path, {name: 31})
    before = (tmp_path / name).stat().st_mtime_ns
    note_use([tmp_path / name, tmp_path / "gone"])
    remove_old(tmp_path)
    assert (tmp_path / name).stat().st_mtime_ns == before, "it looks written"


def test_beyond_a_size_the_longest_unused_goes_first(tmp_path, monkeypatch):
    ages = {f"sim.engine.loop.f{days}-{STAMP}.py311.nbi": days for days in (5, 0, 7, 2, 9)}
    fill(tmp_path, ages)
    monkeypatch.setattr(module, "KEPT_BYTES", 300)
    remove_old(tmp_path)
    assert names(tmp_path) == {f"sim.engine.loop.f{days}-{STAMP}.py311.nbi" for days in (0, 2, 5)}
    monkeypatch.setattr(module, "KEPT_BYTES", 0)
    remove_old(tmp_path)
    assert names(tmp_path) == {f"sim.engine.loop.f0-{STAMP}.py311.nbi"}, "another process may be about to load it"


def test_others_may_remove_the_same(tmp_path, monkeypatch):
    fill(tmp_path, {f"sim.engine.loop.f{i}-{STAMP}.py311.nbi": 31 + i for i in range(4)})
    unlink = Path.unlink

    def late(file):
        unlink(file)
        raise FileNotFoundError(errno.ENOENT, "gone", str(file))

    monkeypatch.setattr(Path, "unlink", late)
    remove_old(tmp_path)
    assert names(tmp_path) == set()
    remove_old(tmp_path / "never there")
