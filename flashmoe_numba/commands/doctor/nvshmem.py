"""What layers on GPUs of several hosts need beside what layers on GPUs do: NVSHMEM, and what compiles its headers."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace

from ...build.nvshmem import OLDEST, WHEEL, header_folders
from .gpus import dotted
from .host import Check, check_package, judged, one_line

USE = ("nvshmem",)
FIX = "pip install 'flashmoe-numba[cuda,nvshmem]'"


def check_nvshmem() -> Iterator[Check]:
    """The library and its bindings, and what kernels are built with."""
    yield replace(check_package(WHEEL, OLDEST, USE, FIX, "nvidia.nvshmem"), name="NVSHMEM")
    yield replace(check_package("nvshmem4py-cu13", "0.4", USE, FIX, "nvshmem.bindings"), name="nvshmem4py")
    yield check_headers()
    yield check_nvrtc()


def check_headers() -> Check:
    try:
        return judged("CUDA headers", USE, f"of {', '.join(header_folders())}")
    except ImportError as error:
        return judged("CUDA headers", USE, one_line(error).partition(": ")[0], FIX)


def check_nvrtc() -> Check:
    """Can what NVSHMEM's verbs call (build/nvshmem.cu) be compiled?"""
    try:
        status, *version = importlib.import_module("cuda.bindings.nvrtc").nvrtcVersion()
        return judged("NVRTC", USE, dotted(tuple(version)), FIX if status else "")
    except Exception as error:  # the bindings are there without the library, say
        return judged("NVRTC", USE, one_line(error), FIX)
