"""From the kernel's source to a cubin, without a GPU or a driver; built once, then found on the disk.

Numba compiles to NVVM's intermediate form, nvJitLink links and optimises it. A cubin is kept under a name that stands
for all it depends on: sources, variant, and the versions of what compiles.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from reference.cache_folder import note_use, remove_old
from reference.code_cache import compiler_is_off, gpu_settings

from ..device.compilation import source_hash
from ..tile_gemm.hopper import THREADS
from .nvshmem import network_codes
from .variants import ARCHITECTURES, Variant

COMPILERS = ("numba", "numba-cuda", "llvmlite", "nvidia-nvvm", "nvidia-nvjitlink")
NETWORK = ("nvidia-cuda-nvrtc", "nvidia-nvshmem-cu13")  # what kernels with NVSHMEM depend on beside these
BLOCKS_PER_MULTIPROCESSOR = 2  # one computes while the other waits or stores
SUFFIX, FACTS = ".cubin", ".json"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A linked kernel.

    Args:
        path: of the cubin.
        entry: its symbol.
        registers, spill_bytes, stack_bytes, shared_bytes: of a thread (shared: of a block, static), by the linker.
        warnings: of the linker, on performance.
    """

    variant: Variant
    path: Path
    entry: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    warnings: tuple[str, ...]


def build(variant: Variant, folder: Path) -> Kernel:
    """The variant's kernel, from `folder` if it is there, else compiled (some 20 s) and kept there.

    Raises:
        ImportError: numba-cuda is missing; names the extra.
        RuntimeError: the linker refused, and what it said; or the compiler is switched off.
    """
    stem = stem_of(variant, folder)

    def make() -> Iterator[tuple[Path, bytes]]:
        cubin, log = _link(variant)
        yield stem.with_suffix(SUFFIX), cubin
        yield stem.with_suffix(FACTS), json.dumps(_facts(cubin, log)).encode()

    return found_or_made(folder, lambda: _read(variant, stem), make)


def stem_of(variant: Variant, folder: Path) -> Path:
    """What is made of a variant is kept under this name, with a suffix; it stands for all that it depends on."""
    return folder / f"{variant.name}-{_stamp(variant)}"


def found_or_made(folder: Path, read: Callable[[], T], make: Callable[[], Iterator[tuple[Path, bytes]]]) -> T:
    """What `read` finds in the folder; where that is missing or damaged, after the files of `make` were written."""
    # it is not there; or half a file is, of a full disk
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        return read()
    for path, data in make():
        folder.mkdir(parents=True, exist_ok=True)
        _write(path, data)
    remove_old(folder)
    return read()


def kept_kernels(folder: Path) -> Iterator[Path]:
    """The cubins in a cache folder."""
    yield from sorted(folder.glob(f"*{SUFFIX}"))


def _read(variant: Variant, stem: Path) -> Kernel:
    path = stem.with_suffix(SUFFIX)
    facts = json.loads(stem.with_suffix(FACTS).read_text())
    if hashlib.sha256(path.read_bytes()).hexdigest() != facts.pop("sha256"):
        raise ValueError(f"{path} is damaged")
    facts["warnings"] = tuple(facts["warnings"])
    note_use([path, stem.with_suffix(FACTS)])
    return Kernel(variant=variant, path=path, **facts)


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all, also when several processes do it."""
    unfinished = path.with_name(f"{path.name}.tmp.{uuid.uuid4().hex}")
    try:
        unfinished.write_bytes(data)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _stamp(variant: Variant) -> str:
    packages = COMPILERS if variant.heap == "ipc" else COMPILERS + NETWORK
    facts = f"{source_hash()} {_entry_hash()} {variant} {_versions(packages)} {gpu_settings()}"
    return hashlib.sha256(facts.encode()).hexdigest()[:24]


@cache
def _entry_hash() -> str:
    """Of the sources that only GPU kernels depend on: the entry, its options, and what makes the record's type.

    Heaps make that; of their sources all count, for a list of some would fall behind.
    """
    folder = Path(__file__).parent
    sources = [*folder.iterdir(), *(folder.parent / "heap").iterdir()]
    files = sorted(file for file in sources if file.suffix in (".py", ".cu"))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


@cache
def _versions(packages: tuple[str, ...]) -> tuple[str, ...]:
    versions = []
    for package in packages:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{package} from elsewhere")
    return tuple(versions)


def compiled(variant: Variant, extra: str = "cuda") -> list[tuple[str, bytes]]:
    """What the linker takes, as (kind, code); `device.cuda_api` can be imported where this has returned.

    Args:
        extra: of this package, that brings what the caller needs.

    Raises:
        ImportError: numba-cuda is missing; names the extra.
        RuntimeError: the compiler is switched off.
    """
    if compiler_is_off():
        raise RuntimeError("nothing can be compiled, because NUMBA_DISABLE_JIT is set")
    try:
        from ..device.cuda_api import compile_to_ltoir
        from .entry import make_entry
    except ImportError as error:
        fix = f"pip install 'flashmoe-numba[{extra}]'"
        raise ImportError(f"kernels for GPUs are compiled by numba-cuda: {fix} ({error})") from error
    kernel, signature = make_entry(variant)
    capability = ARCHITECTURES[variant.architecture]
    codes = compile_to_ltoir(kernel, signature, capability, (THREADS, BLOCKS_PER_MULTIPROCESSOR))
    return codes if variant.heap == "ipc" else codes + network_codes(variant.architecture)


def _link(variant: Variant) -> tuple[bytes, str]:
    """(cubin, the linker's log)"""
    codes = compiled(variant)
    from ..device.cuda_api import link

    return link(codes, variant.architecture)


def _facts(cubin: bytes, log: str) -> dict[str, object]:
    def total(pattern: str) -> int:
        return sum(int(number) for number in re.findall(pattern, log))

    entries = set(re.findall(rb"\.text\.(\w+)", cubin))
    if len(entries) != 1:
        raise RuntimeError(f"the linked kernel must have one entry, got {sorted(entries)}")
    return {
        "sha256": hashlib.sha256(cubin).hexdigest(),
        "entry": entries.pop().decode(),
        "registers": max(map(int, re.findall(r"Used (\d+) registers", log)), default=0),
        "spill_bytes": total(r"(\d+) bytes spill stores"),
        "stack_bytes": total(r"(\d+) bytes stack frame"),
        "shared_bytes": total(r"(\d+) bytes smem"),
        "warnings": re.findall(r"Potential Performance Loss: ([^\n]*?) (?:in|for) the function", log),
    }
