"""What CUDA answers when it refuses, by its own names, and CuPy's exceptions that carry it."""

from __future__ import annotations

from enum import IntEnum


class Status(IntEnum):
    """Those of cudaError_t that are answered here."""

    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInvalidPitchValue = 12
    cudaErrorInvalidDevice = 101
    cudaErrorDeviceUninitialized = 201
    cudaErrorInvalidResourceHandle = 400
    cudaErrorSymbolNotFound = 500
    cudaErrorLaunchFailure = 719
    cudaErrorCooperativeLaunchTooLarge = 720
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901
    cudaErrorStreamCaptureIsolation = 905
    cudaErrorStreamCaptureImplicit = 906
    cudaErrorCapturedEvent = 907


class CUDARuntimeError(RuntimeError):
    """As CuPy's, but that it says why."""

    def __init__(self, status: Status, why: str) -> None:
        super().__init__(f"{status.name}: {why}")
        self.status = int(status)


class OutOfMemoryError(MemoryError):
    """A pool of arrays is exhausted."""
