"""The disk cache of compiled kernels: found again, shared by processes that start together, dispensable."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numba import njit

from flashmoe_numba.device import compilation
from flashmoe_numba.device.compilation import compile_for
from flashmoe_numba.device.cpu import JIT_OPTIONS
from reference.cache_folder import cache_folder

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).parent


def start(folder, go):
    environment = dict(os.environ, FLASHMOE_CACHE_DIR=str(folder), PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    command = [sys.executable, str(HERE / "cached_kernel.py"), str(go)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(processes, go):
    """Let all begin together, and return what each printed."""
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.communicate()
    go.touch()
    results = []
    for process in processes:
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0 and err == "", f"{out}\n{err}"
        results.append(out.strip())
    return results


def listing(folder):
    return sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir())


def test_a_second_process_loads_what_the_first_compiled(tmp_path):
    folder, go = tmp_path / "not yet there" / "cache", tmp_path / "go"
    assert finish([start(folder, go)], go) == ["[5, 6, 7] compiled"]
    files = listing(folder)
    assert len(files) == 2, f"one index and one object file: {files}"
    assert finish([start(folder, go)], go) == ["[5, 6, 7] loaded"]
    assert listing(folder) == files, "the second process wrote"


def test_processes_that_start_together_do_not_spoil_the_cache(tmp_path):
    for attempt in range(2):
        folder, go = tmp_path / f"cache {attempt}", tmp_path / f"go {attempt}"
        results = finish([start(folder, go) for _ in range(3)], go)
        assert {result.split("]")[0] for result in results} == {"[5, 6, 7"}, f"{results}"
        assert finish([start(folder, go)], go) == ["[5, 6, 7] loaded"]
        assert not [name for name, _ in listing(folder) if "tmp" in name], f"{listing(folder)}"


def triple(words, i):
    words[i] *= 3


@pytest.mark.parametrize("trouble", ["a file in its place", "no permission"])
def test_an_unusable_folder_costs_a_warning_only(tmp_path, monkeypatch, trouble):
    folder = tmp_path / "cache"
    if trouble == "no permission":
        folder.mkdir(mode=0o500)
        if os.access(folder, os.W_OK):
            folder = Path("/proc/flashmoe")  # root may write anywhere else
    else:
        folder.write_text("not a folder")
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", str(folder))
    function, words = njit(**JIT_OPTIONS)(triple), np.array([1, 2])
    with pytest.warns(UserWarning, match=rf"compiled kernels are not kept: {folder} cannot be used \("):
        compile_for(function, (words, 1))
    function(words, 1)
    assert words.tolist() == [1, 6]


def test_a_spoilt_cache_file_is_replaced(tmp_path):
    go = tmp_path / "go"
    folder = tmp_path / "cache"
    finish([start(folder, go)], go)
    for suffix in ("nbc", "nbi"):
        for file in folder.glob(f"*.{suffix}"):
            file.write_bytes(file.read_bytes()[:100])
        process = start(folder, go)
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0 and "[5, 6, 7]" in out, f"half a .{suffix} file: {out}\n{err}"


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", str(tmp_path / "a"))
    assert cache_folder() == tmp_path / "a"
    monkeypatch.delenv("FLASHMOE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_folder() == tmp_path / "b" / "flashmoe-numba"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert cache_folder() == tmp_path / "c" / ".cache" / "flashmoe-numba"


COMPILED = ("device", "kernel", "tile_gemm")


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """`source_hash` of a copy of the project, to edit."""
    for package in ("flashmoe_numba", "reference"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(compilation, "PACKAGE", tmp_path / "flashmoe_numba")
    return tmp_path


def test_every_source_of_the_kernel_is_in_the_stamp(copied):
    hash_now = compilation.source_hash.__wrapped__
    files = [file for folder in COMPILED for file in (copied / "flashmoe_numba" / folder).glob("*.py")]
    modules = {
        node.module or alias.name
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "reference"
        for alias in node.names
    }
    names = {name.partition(".")[2] for name in modules} | {"layout"}  # `from reference import layout`
    not_compiled = {"code_cache", "arrays", ""}  # the cache itself; names of types
    places = [copied.joinpath("reference", *name.split(".")) for name in names - not_compiled]
    files += [place / "__init__.py" if place.is_dir() else place.with_suffix(".py") for place in places]
    assert len(files) > 15
    before = hash_now()
    assert before == hash_now() == compilation.source_hash(), "the copy is the original"
    for file in files:
        source = file.read_text()
        file.write_text(source + "\n")
        assert hash_now() != before, f"{file.relative_to(copied)} can change without a new compilation"
        file.write_text(source)
    assert hash_now() == before
