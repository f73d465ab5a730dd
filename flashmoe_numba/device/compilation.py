"""How kernel functions are compiled, and how the same source is loaded uncompiled for the interpreted target.

Kernel code is spread over files and its meaning over overloads, so what is kept on the disk is stamped with a hash of
all of them (reference/code_cache.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import sys
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from reference.code_cache import CodeCache

PACKAGE = Path(__file__).resolve().parent.parent
_switch = threading.local()  # .interpreting: this thread loads kernel source to be interpreted
_lock = threading.RLock()  # of twins in the making, and of the cache that a dispatcher has at the moment


def jit(function: Any = None, *, entry: bool = False, inline: bool = False, large: bool = False) -> Any:
    """Compile a kernel function on its first call; inside `interpreted`, leave it as it is.

    Only an `entry` has machine code, and can be called from Python when compiled; the others refuse (parts.py).
    A function that returns an array that it made, a view of a peer's memory, must be put into its callers (`inline`).
    So must one that is too `large` for the compiler to do so, and holds wgmma: behind a call that is serialised.
    """
    if function is None:
        return lambda function: jit(function, entry=entry, inline=inline, large=large)
    if getattr(_switch, "interpreting", False):
        return function
    from numba import njit

    from .cpu import ENTRY_OPTIONS, part  # and registers the overloads

    if entry:
        # On GPUs an entry goes into the kernel's, for the same reason.
        return njit(**ENTRY_OPTIONS, forceinline=True)(function)
    return part(function, inline="always" if inline else "never", forceinline=large)


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
    reference = PACKAGE.parent / "reference"
    folders = [PACKAGE / "device", PACKAGE / "kernel", PACKAGE / "tile_gemm", reference / "activations"]
    names = "expert_gradients", "experts", "formats", "layer_kinds", "layout", "scalars", "task_kinds"
    files = [reference / f"{name}.py" for name in names]
    for file in sorted(file for folder in folders for file in folder.rglob("*.py")) + files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def compile_for(dispatcher: Any, arguments: tuple[Any, ...], folder: Path | None = None) -> Any:
    """Compile a kernel for arguments of these types, or load it from `folder`, by default `usable_cache_folder()`.

    Returns:
        What runs it for arguments of just these types. The dispatcher would look at their types at every call, which
        takes as long as a small layer's first tasks.
    """
    from numba import typeof

    signature = tuple(typeof(argument) for argument in arguments)
    with _lock:
        if signature not in dispatcher.overloads:
            dispatcher._cache = CodeCache(dispatcher.py_func, source_hash(), folder)
            dispatcher.compile(signature)
        return dispatcher.overloads[signature].entry_point
