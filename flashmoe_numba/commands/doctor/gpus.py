"""What GPUs need, checked one thing at a time, as in host.py: packages that build and run, driver, devices."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

from ...build.sass import find_nvdisasm
from ...build.variants import ARCHITECTURES, architecture_of
from ...gpu.driver import Device, Driver
from .host import OK, WARN, Check, check_package, judged, one_line

OLDEST_DRIVER = (13, 0)  # CUDA's, of the compilers that setup.cfg asks for
BUILDING = ("compile", "cuda", "nvshmem")
RUNNING = ("cuda", "nvshmem")
BUILD_FIX, FIX = "pip install 'flashmoe-numba[compile]'", "pip install 'flashmoe-numba[cuda]'"


def check_gpus(driver: Driver) -> Iterator[Check]:
    """All that building for GPUs and running there need."""
    yield check_numba_cuda()
    yield check_linker()
    yield check_disassembler()
    yield check_package("cupy-cuda13x", "14", RUNNING, FIX, "cupy")
    yield check_driver(driver)
    yield check_devices(driver)
    for index, device in enumerate(driver.devices):
        yield check_device(index, device)
    if len(driver.devices) > 1:
        yield check_peers(driver)


def check_numba_cuda() -> Check:
    """The package, and that Numba's CUDA target is really this package and not the old one inside Numba."""
    check = check_package("numba-cuda", "0.30", BUILDING, BUILD_FIX)
    if check.status != OK:
        return check
    try:
        implementation = importlib.import_module("flashmoe_numba.device.cuda_api").cuda.implementation
        return replace(check, found=f"{check.found}, implementation {implementation}")
    except Exception as error:  # Numba and numba-cuda of versions that do not fit may raise anything
        return judged(check.name, BUILDING, f"{check.found}, cannot be used: {one_line(error)}", BUILD_FIX)


def check_linker() -> Check:
    try:
        return judged("nvJitLink", BUILDING, dotted(importlib.import_module("cuda.bindings.nvjitlink").version()))
    except Exception as error:  # the bindings are there without the library, say
        return judged("nvJitLink", BUILDING, one_line(error), BUILD_FIX)


def check_disassembler() -> Check:
    try:
        return judged("nvdisasm", ("compile",), str(find_nvdisasm()))
    except FileNotFoundError:
        return judged("nvdisasm", ("compile",), "not found", BUILD_FIX)


def check_driver(driver: Driver) -> Check:
    name = "NVIDIA driver"
    if driver.version is None:
        return judged(name, RUNNING, driver.error, "install it; in a container: docker run --gpus all")
    fix = f"install one for CUDA {dotted(OLDEST_DRIVER)} or newer"
    found = f"runs CUDA {dotted(driver.version)}"
    return judged(name, RUNNING, found, fix if driver.version < OLDEST_DRIVER else "")


def check_devices(driver: Driver) -> Check:
    """Is there a GPU for which there is a kernel, and does the driver answer all that it was asked?"""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    limited = "" if visible is None else f", CUDA_VISIBLE_DEVICES={visible!r}"
    usable = [device for device in driver.devices if not _no_kernel(device)]
    if usable:
        return judged("GPUs", RUNNING, f"{len(usable)} usable of {len(driver.devices)}{limited}")
    refused = f", {driver.error}" if driver.version and driver.error else ""
    found = f"{'none usable' if driver.devices else 'none'}{limited}{refused}"
    fix = "unset CUDA_VISIBLE_DEVICES" if limited else "see what nvidia-smi says; in a container: docker run --gpus all"
    if driver.devices:
        fix = f"use one for which there are kernels: {', '.join(ARCHITECTURES)}"
    return judged("GPUs", RUNNING, found, fix)


def check_device(index: int, device: Device) -> Check:
    """Is there a kernel for it? One that has none can be left out."""
    name, lacking = f"GPU {index}", _no_kernel(device)
    found = f"{device.name}, {device.memory_bytes / 2**30:.1f} GiB, compute capability {dotted(device.capability)}"
    if not lacking:
        return judged(name, (), f"{found}, kernels for {architecture_of(device.capability)}")
    return judged(name, (), f"{found}, {lacking}", "use another, by CUDA_VISIBLE_DEVICES or FlashMoE(..., device=N)")


def _no_kernel(device: Device) -> str:
    """Why a GPU cannot be used; nothing if it can."""
    try:
        architecture_of(device.capability)
        return ""
    except ValueError as error:
        return str(error)


def check_peers(driver: Driver) -> Check:
    """Ranks store into each other's memory, so all of their GPUs must reach each other. One GPU needs no peers."""
    pairs = combinations(range(len(driver.devices)), 2)
    apart = [f"{i} and {j}" for i, j in pairs if not (driver.peers[i][j] and driver.peers[j][i])]
    if not apart:
        return judged("peer access", (), "between all GPUs")
    fix = "choose GPUs that reach each other by CUDA_VISIBLE_DEVICES (nvidia-smi topo -p2p r), or one GPU for all ranks"
    return judged("peer access", (), f"none between GPUs {', '.join(apart)}", fix, WARN)


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
