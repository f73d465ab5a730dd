"""Compiled functions on the disk: damage heals, and all that changes code is in a file's name."""

import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import llvmlite
import numba
import numpy as np
import pytest
from numba import config, njit
from numba.core.config import _OptLevel

from reference import code_cache
from reference.cache_folder import KINDS
from reference.code_cache import CodeCache, gpu_settings


def triple(i):
    return 3 * i


def other(i):
    return 5 * i


def run(folder, sources="none"):
    """Call the function in a dispatcher of its own; was its code found?"""
    dispatcher = njit(triple)
    dispatcher._cache = CodeCache(triple, sources, folder)
    assert dispatcher(14) == 42
    return sum(dispatcher.stats.cache_hits.values()) == 1


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """{name: bytes} of the two files of a function."""
    folder = tmp_path_factory.mktemp("cache")
    assert not run(folder)
    assert run(folder), "it is found again"
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert sorted(Path(name).suffix for name in files) == [".nbc", ".nbi"]
    assert all(KINDS["CPU kernels (*.nbi, *.nbc)"].fullmatch(name) for name in files)
    return files


def put(folder, files):
    for name, data in files.items():
        (folder / name).write_bytes(data)


def flipped(data):
    """One bit of the machine code is wrong: pickle does not notice."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


DAMAGE = {
    "empty": lambda data: b"",
    "halved": lambda data: data[: len(data) // 2],
    "random": lambda data: np.random.default_rng(0).bytes(len(data)),
    "one bit": flipped,
    "another object": lambda data: pickle.dumps(numba.__version__) + pickle.dumps(("a", 3)),
    "longer": lambda data: bytes(3) + data,
}


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_heals_without_a_word(tmp_path, good, damage, suffix):
    put(tmp_path, good)
    (file,) = tmp_path.glob(f"*{suffix}")
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    assert not run(tmp_path), "damaged code was run"
    assert run(tmp_path), f"{sorted(tmp_path.iterdir())}"


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
def test_a_folder_in_place_of_a_file_costs_a_warning(tmp_path, good, suffix):
    put(tmp_path, good)
    (file,) = tmp_path.glob(f"*{suffix}")
    file.unlink()
    file.mkdir()
    with pytest.warns(UserWarning, match=f"compiled kernels are not kept: {tmp_path} cannot be used") as said:
        found = [run(tmp_path), run(tmp_path)]
    assert found == [False, False]
    assert len(said) == 1
    assert file.is_dir(), "it is not ours"


def test_a_file_that_cannot_be_read_is_replaced(tmp_path, good, monkeypatch):
    put(tmp_path, good)
    open_file = open

    def refuse(path, mode="r", *rest, **options):
        if mode == "rb" and str(path).startswith(str(tmp_path)):
            raise PermissionError(13, "Permission denied", str(path))
        return open_file(path, mode, *rest, **options)

    with monkeypatch.context() as patched:
        patched.setattr("builtins.open", refuse)
        dispatcher = njit(triple)
        assert CodeCache(triple, "none", tmp_path).load_overload((numba.int64,), dispatcher.targetctx) is None
    assert not run(tmp_path)
    assert run(tmp_path)


def test_what_numba_ties_to_a_process_is_not_kept(tmp_path):
    """As all code that it makes under NUMBA_OPT=0."""
    result = SimpleNamespace(library=SimpleNamespace(has_dynamic_globals=True))
    with pytest.warns(UserWarning, match="compiled kernels are not kept: .* as it does under NUMBA_OPT=0"):
        CodeCache(triple, "none", tmp_path).save_overload((numba.int64,), result)
    assert list(tmp_path.iterdir()) == []


# names


def name_of(function=triple, sources="none", signature=(numba.int64,)):
    codegen = njit(function).targetctx.codegen()
    return CodeCache(function, sources, Path("anywhere"))._index(signature, codegen)._index_name


def test_function_sources_and_signature_are_in_the_name():
    names = [name_of(), name_of(other), name_of(sources="more"), name_of(signature=(numba.float64,))]
    assert len(set(names)) == len(names)
    assert name_of() == names[0]


CHANGE_CODE = {
    "DEBUGINFO_DEFAULT": 1,
    "BOUNDSCHECK": 1,
    "OPT": _OptLevel(0),
    "LOOP_VECTORIZE": 0,
    "SLP_VECTORIZE": 1,
    "ENABLE_AVX": not config.ENABLE_AVX,
    "CPU_NAME": "x86-64",
    "CPU_FEATURES": "-avx2",
    "DISABLE_INTEL_SVML": not config.DISABLE_INTEL_SVML,
    "LLVM_REFPRUNE_PASS": 0,
    "LLVM_REFPRUNE_FLAGS": "per_bb",
    "EXTEND_VARIABLE_LIFETIMES": 1,
    "DEBUG_NRT": 1,
    "ENABLE_PROFILING": 1,
    "SETTING_OF_A_LATER_NUMBA": 1,
}


@pytest.mark.parametrize("setting", CHANGE_CODE)
def test_settings_that_change_code_are_in_the_name(monkeypatch, setting):
    usual = name_of()
    monkeypatch.setattr(config, setting, CHANGE_CODE[setting], raising=False)
    assert name_of() != usual


def test_settings_that_leave_code_as_it_is_are_not_in_the_name(monkeypatch):
    usual = name_of()
    harmless = {"CACHE_DIR": "/x", "NUMBA_NUM_THREADS": 99, "COLOR_SCHEME": "dark_bg", "THREADING_LAYER": "omp"}
    for setting, value in (harmless | {"CUDA_LOG_SIZE": 3, "GDB_BINARY": "/usr/bin/gdb", "DUMP_LLVM": 0}).items():
        monkeypatch.setattr(config, setting, value)
    assert name_of() == usual


def test_a_setting_made_after_numba_was_imported_counts(monkeypatch):
    """Numba reads the environment again when it compiles, which is after the name is made."""
    usual = name_of()
    with monkeypatch.context() as patched:
        patched.setenv("NUMBA_BOUNDSCHECK", "1")
        assert name_of() != usual
    assert name_of() == usual


@pytest.mark.parametrize("package", [numba, llvmlite, np])
def test_versions_are_in_the_name(monkeypatch, package):
    usual = name_of()
    monkeypatch.setattr(package, "__version__", "99.0")
    monkeypatch.setattr(code_cache, "_versions", code_cache._versions.__wrapped__)
    assert name_of() != usual


def test_the_settings_of_kernels_for_gpus(monkeypatch):
    for name in [name for name in os.environ if name.startswith("NUMBA_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NUMBA_NUM_THREADS", "3")
    assert gpu_settings() == []
    monkeypatch.setenv("NUMBA_CUDA_DEBUGINFO", "1")
    monkeypatch.setenv("NUMBA_OPT", "1")
    assert gpu_settings() == ["CUDA_DEBUGINFO='1'", "OPT='1'"]
