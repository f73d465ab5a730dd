"""Numba's compiled functions on the disk, so that all that changes code is in a file's name, and damage heals.

Numba's own disk cache looks at the file of a function and at the processor: it goes on with what was compiled from
other sources or under other settings, numbers files in an index that concurrent writers overwrite, and fails on half a
file. Numba is imported where it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import pickle
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

from .cache_folder import note_use, remove_old, unusable, usable_cache_folder, warn_not_kept

ENTRY = "code"  # the one entry of an index
# Settings of Numba that leave code as it is, and that differ by machine or by taste; all others are in a file's name.
HARMLESS = re.compile(
    r"_.*|CACHE_.*|DEBUG_CACHE|DUMP_.*|.*NUM_THREADS|THREADING_LAYER.*|GDB_BINARY|COLOR_SCHEME|SHOW_HELP"
    r"|HIGHLIGHT_DUMPS|FULL_TRACEBACKS|DEVELOPER_MODE|DISABLE_PERFORMANCE_WARNINGS|FUNCTION_CACHE_SIZE|DISABLE_JIT"
)


class CodeCache:
    """What a dispatcher asks for code before it compiles, and gives it to afterwards (`dispatcher._cache`).

    Args:
        function: the dispatcher's.
        sources: a hash of every source that its code can depend on.
        folder: where files are; by default `usable_cache_folder()` at the first use.
    """

    def __init__(self, function: Any, sources: str, folder: Path | None = None) -> None:
        self._function, self.sources, self._folder = function, sources, folder

    @property
    def folder(self) -> Path:
        return self._folder or usable_cache_folder()

    @property
    def cache_path(self) -> str:
        """As Numba asks for it."""
        return str(self.folder)

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        """The compiled function for a signature; None if it is not there, or damaged."""
        target_context.refresh()
        index = self._index(signature, target_context.codegen())
        paths = [self.folder / index._index_name, self.folder / index._data_name(1)]
        try:
            kept = index.load(ENTRY)
            result = None if kept is None else _numba("compiler").CompileResult._rebuild(target_context, *_unpack(kept))
        except Exception:  # half a file, say of a disk that was full: pickle may raise anything
            _discard(paths)
            return None
        note_use(paths if result is not None else [])
        return result

    def save_overload(self, signature: Any, result: Any) -> None:
        """Keep a compiled function."""
        if result.library.has_dynamic_globals:
            warn_not_kept("Numba left addresses of this process in them, as it does under NUMBA_OPT=0")
            return
        code = _numba("serialize").dumps(result._reduce())
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._index(signature, result.codegen).save(ENTRY, _pack(code))
            remove_old(self.folder)
        except Exception as error:  # the disk is full, or a damaged index cannot be removed
            warn_not_kept(unusable(self.folder, error))

    def _index(self, signature: Any, codegen: Any) -> Any:
        """Numba's pair of files, under a name that stands for the code."""
        facts = f"{self.sources} {signature} {codegen.magic_tuple()} {_cpu_settings()} {_versions()}"
        stamp = hashlib.sha256(facts.encode()).hexdigest()[:24]
        name = f"{self._function.__module__}.{self._function.__qualname__}".replace("<", "").replace(">", "")
        python = f"{sys.version_info[0]}{sys.version_info[1]}{sys.abiflags}"
        return _numba("caching").IndexDataCacheFile(str(self.folder), f"{name}-{stamp}.py{python}", stamp)


def compiler_is_off() -> bool:
    """Does a setting (NUMBA_DISABLE_JIT) keep Numba from compiling anything? Known without importing it."""
    config = sys.modules.get("numba.core.config")
    return os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0") if config is None else bool(config.DISABLE_JIT)


def _numba(module: str) -> Any:
    return importlib.import_module(f"numba.core.{module}")


def _pack(code: bytes) -> tuple[bytes, bytes]:
    return hashlib.sha256(code).digest(), code


def _unpack(kept: tuple[bytes, bytes]) -> Any:
    """What was pickled. Machine code with a wrong bit would be run, and the process might crash: hence the digest."""
    digest, code = kept
    if hashlib.sha256(code).digest() != digest:
        raise ValueError("damaged")
    return pickle.loads(code)


def _discard(paths: list[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):  # gone, or it cannot be removed, which whoever writes there will say
            path.unlink()


def _cpu_settings() -> list[str]:
    """Numba's settings that may change code for CPUs, whether from the environment, a file or `numba.config`."""
    config = _numba("config")
    config.reload_config()
    return _chosen({name: value for name, value in vars(config).items() if name.isupper() and "CUDA" not in name})


def gpu_settings() -> list[str]:
    """The same for GPUs; of the environment only, because numba-cuda has a configuration of its own."""
    names = (name for name in os.environ if name.startswith("NUMBA_"))
    return _chosen({name.removeprefix("NUMBA_"): os.environ[name] for name in names})


def _chosen(settings: dict[str, Any]) -> list[str]:
    return [f"{name}={value!r}" for name, value in sorted(settings.items()) if not HARMLESS.fullmatch(name)]


@cache
def _versions() -> list[str]:
    return [f"{name} {importlib.import_module(name).__version__}" for name in ("numba", "llvmlite", "numpy")]
