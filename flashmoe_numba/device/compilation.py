"""How kernel functions are compiled, and how the same source is loaded uncompiled for the interpreted target.

Numba's disk cache notices a change in the file of the cached function only. Kernel code is spread over files and its
meaning over overloads, so the cache here is stamped with a hash of all of them.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import importlib
import importlib.util
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = Path(__file__).resolve().parent.parent
_switch = threading.local()  # .interpreting: this thread loads kernel source to be interpreted
_lock = threading.RLock()  # of twins in the making, and of the cache that a dispatcher has at the moment


def jit(function=None, *, entry=False):
    """Compile a kernel function on its first call; inside `interpreted`, leave it as it is.

    Only an `entry` can be called from Python when compiled: the wrappers for that take longer to compile than the code.
    """
    if function is None:
        return lambda function: jit(function, entry=entry)
    if getattr(_switch, "interpreting", False):
        return function
    from numba import njit

    from .cpu import JIT_OPTIONS  # and registers the overloads

    return njit(**JIT_OPTIONS, no_cpython_wrapper=not entry, no_cfunc_wrapper=True)(function)


def interpreted(package: str) -> ModuleType:
    """The package loaded a second time with `jit` switched off, its relative imports included."""
    twin = f"{package}_interpreted"
    with _lock:
        if twin not in sys.modules:
            load_interpreted(Path(importlib.import_module(package).__path__[0]), twin)
        return sys.modules[twin]


def load_interpreted(folder: Path, name: str) -> ModuleType:
    """The package in `folder` loaded under a name of its own, with `jit` switched off."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        with _interpretation():
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextlib.contextmanager
def _interpretation() -> Iterator[None]:
    _switch.interpreting = True
    try:
        yield
    finally:
        _switch.interpreting = False


@cache
def source_hash() -> str:
    """Hash of every source file that compiled code can depend on."""
    digest = hashlib.sha256()
    folders = [PACKAGE / name for name in ("device", "kernel", "tile_gemm")]
    reference = [PACKAGE.parent / "reference" / name for name in ("config.py", "layout.py", "tiles.py")]
    for file in sorted(file for folder in folders for file in folder.rglob("*.py")) + reference:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where compiled kernels are kept: $FLASHMOE_CACHE_DIR, else flashmoe-numba in the user's cache folder."""
    explicit = os.environ.get("FLASHMOE_CACHE_DIR")
    if explicit:
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashmoe-numba"


def usable_cache_folder() -> Path:
    """`cache_folder()`; where that cannot be written, with a warning, a temporary one of this process."""
    return _usable(cache_folder())


@cache
def _usable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        warnings.warn(f"compiled kernels are not kept: {folder} cannot be used ({error})", stacklevel=3)
    temporary = tempfile.TemporaryDirectory(prefix="flashmoe-numba-")
    atexit.register(temporary.cleanup)
    return Path(temporary.name)


def compile_for(dispatcher: Any, arguments: tuple[Any, ...], folder: Path | None = None) -> None:
    """Compile a kernel for arguments of these types, or load it from `folder`, by default `usable_cache_folder()`."""
    from numba import typeof

    signature = tuple(typeof(argument) for argument in arguments)
    with _lock:
        if signature not in dispatcher.overloads:
            _compile(dispatcher, signature, folder or usable_cache_folder())


def _compile(dispatcher: Any, signature: tuple[Any, ...], folder: Path) -> None:
    try:
        dispatcher._cache = _disk_cache(dispatcher.py_func, signature, folder)
        dispatcher.compile(signature)
    except OSError as error:  # the disk is full, say
        from numba.core.caching import NullCache

        warnings.warn(f"compiled kernels are not kept: {folder} cannot be used ({error})", stacklevel=2)
        dispatcher._cache = NullCache()
        dispatcher.compile(signature)


def _disk_cache(function: Any, signature: tuple[Any, ...], folder: Path) -> Any:
    """A cache with files of its own for one signature on one kind of machine.

    Numba numbers the files of a function in an index that concurrent writers overwrite, so that two of them may end up
    with one name. Here every writer of a name writes the same code.
    """
    from llvmlite import binding
    from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator

    machine = binding.get_host_cpu_name() + binding.get_host_cpu_features().flatten()
    name = hashlib.sha256(f"{source_hash()} {signature} {machine}".encode()).hexdigest()[:24]

    class Locator(_CacheLocator):
        @classmethod
        def from_function(cls, py_func: Any, py_file: str) -> Any:
            return cls()

        def get_cache_path(self) -> str:
            return str(folder)

        def get_source_stamp(self) -> str:
            return name

        def get_disambiguator(self) -> str:
            return name

    class Files(CompileResultCacheImpl):
        _locator_classes = (Locator,)

    class KernelCache(FunctionCache):
        _impl_class = Files

        def load_overload(self, sig: Any, target_context: Any) -> Any:
            try:
                return super().load_overload(sig, target_context)
            except OSError:
                raise
            except Exception:  # half a file, say of a disk that was full: pickle may raise anything
                self.flush()
                return None

    Locator().ensure_cache_path()
    return KernelCache(function)
