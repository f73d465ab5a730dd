"""NVSHMEM's part of a kernel whose peers are on other hosts: what its verbs call (nvshmem.cu), compiled by NVRTC.

NVSHMEM's device code comes from its headers, not from its library of machine code: so the linker sees all of it, and
wgmma is not serialised, as in a kernel that calls what the assembler does not know. That is how nvshmem4py builds for
Numba, and it leaves out what NVRTC cannot compile, requests that a GPU gives to the network card itself (IBGDA): here
a thread of the host passes them on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path

CUDA_SOURCE = Path(__file__).with_name("nvshmem.cu")
CALLED = ("flashmoe_put_signal", "flashmoe_acquire", "flashmoe_push_control")  # by the kernel, of CUDA_SOURCE
PUT_SIGNAL = "nvshmemi_transfer_put_signal"  # in the name of what the first of them calls in the end
HEADERS = ("nvshmem", "cudart", "cccl")
WHEEL, OLDEST = "nvidia-nvshmem-cu13", "3.8"
FIX = "pip install 'flashmoe-numba[compile,nvshmem]'"


def network_codes(architecture: str) -> list[tuple[str, bytes]]:
    """(kind, code) of what the linker takes beside the kernel; some seconds.

    Raises:
        ImportError: NVSHMEM or what compiles its headers is missing; names the extra.
        RuntimeError: what the compiler said.
    """
    check_version()
    return [("ltoir", compile_cuda(CUDA_SOURCE, architecture, header_folders().values()))]


def compile_cuda(source: Path, architecture: str, folders: Iterable[Path] = ()) -> bytes:
    """CUDA C++ in the form in which the linker can put it into a kernel.

    Args:
        folders: of headers.

    Raises:
        ImportError, RuntimeError: as above.
    """
    try:
        from cuda.core import Program, ProgramOptions
    except ImportError as error:
        raise ImportError(f"{source.name} is compiled by cuda.core and NVRTC: {FIX} ({error})") from error
    options = ProgramOptions(
        arch=architecture,
        include_path=[str(folder) for folder in folders],
        relocatable_device_code=True,
        link_time_optimization=True,
        std="c++17",
    )
    return bytes(Program(source.read_text(encoding="utf-8"), "c++", options).compile("ltoir").code)


def header_folders() -> dict[str, Path]:
    """Where the headers of HEADERS are.

    Raises:
        ImportError: of one of them they are not found; names the extra.
    """
    try:
        from cuda.pathfinder import find_nvidia_header_directory
    except ImportError as error:
        raise ImportError(f"NVSHMEM is found by cuda.pathfinder: {FIX} ({error})") from error
    found = {name: find_nvidia_header_directory(name) for name in HEADERS}
    missing = [name for name, folder in found.items() if folder is None]
    if missing:
        raise ImportError(f"kernels for several hosts need the headers of {', '.join(missing)}, not found here: {FIX}")
    return {name: Path(folder) for name, folder in found.items()}


def check_version() -> None:
    """Raise an ImportError that names the extra, if NVSHMEM is too old, such as what comes with PyTorch."""
    with suppress(metadata.PackageNotFoundError):  # from elsewhere
        version = metadata.version(WHEEL)
        if numbers_of(version) < numbers_of(OLDEST):
            raise ImportError(f"kernels for several hosts need NVSHMEM {OLDEST} or newer, found {version}: {FIX}")


def numbers_of(version: str) -> list[int]:
    """The first two, by which versions are compared."""
    return [int(number) for number in re.findall(r"\d+", version)[:2]]
