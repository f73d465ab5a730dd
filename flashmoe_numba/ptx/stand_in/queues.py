"""Devices and streams: what is put on a stream runs at once, which is a legal order, or is recorded for a graph.

A capture has one stream; CUDA lets others join it. What CUDA forbids meanwhile is refused as it does, and makes the
capture invalid. Each thread has its own current device and streams.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NoReturn

from .errors import CUDARuntimeError, Status

LEGACY = 0  # the stream that everybody has
GLOBAL, THREAD_LOCAL, RELAXED = range(3)  # cudaStreamCaptureMode
FIRST_STREAM = 0x5EA0  # no small number, so that an index passed as a stream is found

Step = Callable[[], None]


@dataclass
class Capture:
    """What a stream does while it is recorded.

    Args:
        mode: cudaStreamCaptureMode: which unsafe calls are forbidden meanwhile.
        thread: that began it.
    """

    mode: int
    thread: int = field(default_factory=threading.get_ident)
    steps: list[Step] = field(default_factory=list)
    valid: bool = True

    def refuse(self, status: Status, why: str) -> NoReturn:
        self.valid = False
        raise CUDARuntimeError(status, why)

    def require_valid(self) -> None:
        if not self.valid:
            raise CUDARuntimeError(Status.cudaErrorStreamCaptureInvalidated, "an earlier call broke this capture")


@dataclass
class Queue:
    """One stream."""

    device: int
    blocking: bool
    capture: Capture | None = None


class _OfThread(threading.local):
    """What is current, and what was before."""

    def __init__(self) -> None:
        self.devices = [0]
        self.streams: dict[int, list[int]] = {}
        self.mode = GLOBAL


class Queues:
    """All streams of the devices `range(num_devices)`."""

    def __init__(self, num_devices: int) -> None:
        self.num_devices = num_devices
        self.broken: str | None = None  # why nothing works from now on, as on a GPU after a failed launch
        self._of_thread, self._numbers = _OfThread(), itertools.count(FIRST_STREAM, 16)
        self._queues: dict[int, Queue] = {}
        self._legacy = [Queue(device, blocking=True) for device in range(num_devices)]

    # what is current

    @property
    def device(self) -> int:
        return self._of_thread.devices[-1]

    @property
    def stream(self) -> int:
        return self.stream_of(self.device)

    def stream_of(self, device: int) -> int:
        """The current one of this thread."""
        return self._of_thread.streams.get(device, [LEGACY])[-1]

    def enter_device(self, device: int) -> None:
        self.check_device(device)
        self._of_thread.devices.append(device)

    def leave_device(self) -> None:
        self._of_thread.devices.pop()

    def enter_stream(self, stream: int) -> None:
        self.queue(stream)
        self._of_thread.streams.setdefault(self.device, [LEGACY]).append(stream)

    def leave_stream(self) -> None:
        self._of_thread.streams[self.device].pop()

    def check_device(self, device: int) -> None:
        if not 0 <= device < self.num_devices:
            why = f"device must be in [0, {self.num_devices - 1}], got {device}"
            raise CUDARuntimeError(Status.cudaErrorInvalidDevice, why)

    # streams

    def open(self, blocking: bool) -> int:
        """A new stream of the current device."""
        stream = next(self._numbers)
        self._queues[stream] = Queue(self.device, blocking)
        return stream

    def close(self, stream: int) -> None:
        self._queues.pop(stream, None)

    def queue(self, stream: int) -> Queue:
        """A stream of the current device. CUDA would take a copy in another device's; here that is a mistake, too."""
        if stream == LEGACY:
            return self._legacy[self.device]
        queue = self._queues.get(stream)
        if queue is None or queue.device != self.device:
            where = "no stream" if queue is None else f"one of device {queue.device}"
            why = f"{stream:#x} must be a stream of the current device {self.device}, and is {where}"
            raise CUDARuntimeError(Status.cudaErrorInvalidResourceHandle, why)
        return queue

    def enqueue(self, stream: int, step: Step) -> None:
        """Run a step in the stream's order: now, unless the stream is being captured."""
        queue = self.queue(stream)
        self.raise_if_broken()
        if stream == LEGACY:
            self._refuse_legacy()
        if queue.capture is None:
            step()
        else:
            queue.capture.require_valid()
            queue.capture.steps.append(step)

    def _refuse_legacy(self) -> None:
        """The legacy stream waits for all blocking streams, of which a captured one never runs."""
        for queue in self._queues.values():
            if queue.capture is not None and queue.blocking and queue.device == self.device:
                why = "the legacy stream would depend on a stream that is being captured: make that non-blocking"
                queue.capture.refuse(Status.cudaErrorStreamCaptureImplicit, why)

    def raise_if_broken(self) -> None:
        if self.broken is not None:
            raise CUDARuntimeError(Status.cudaErrorLaunchFailure, self.broken)

    # captures

    def begin_capture(self, stream: int, mode: int) -> None:
        queue = self.queue(stream)
        if stream == LEGACY or queue.capture is not None:
            why = "the legacy stream cannot be captured" if stream == LEGACY else "this stream is captured already"
            raise CUDARuntimeError(Status.cudaErrorStreamCaptureUnsupported, why)
        queue.capture = Capture(mode)

    def end_capture(self, stream: int) -> list[Step]:
        queue = self.queue(stream)
        if queue.capture is None:
            raise CUDARuntimeError(Status.cudaErrorInvalidValue, "this stream is not being captured")
        capture, queue.capture = queue.capture, None
        capture.require_valid()
        return capture.steps

    def wait_for_stream(self, stream: int) -> None:
        """Return when all its work is done: at once."""
        capture = self.queue(stream).capture
        if capture is not None:
            capture.refuse(Status.cudaErrorStreamCaptureUnsupported, "a captured stream cannot be waited for")
        self.raise_if_broken()

    def wait_for_device(self) -> None:
        """Return when all work of the current device is done: at once."""
        for queue in self._queues.values():
            if queue.capture is not None and queue.device == self.device:
                why = f"device {self.device} cannot be waited for while one of its streams is captured"
                queue.capture.refuse(Status.cudaErrorStreamCaptureUnsupported, why)
        self.raise_if_broken()

    def exchange_mode(self, mode: int) -> int:
        """Set which unsafe calls this thread may make during captures, and return what was set."""
        before, self._of_thread.mode = self._of_thread.mode, mode
        return before

    def check_unsafe(self, what: str) -> None:
        """Refuse a call that may wait for the device, as taking memory may, if a capture's mode forbids it.

        A pool may have memory left, and then asks CUDA nothing. Here it never has.
        """
        for capture in self._captures():
            if self._forbids(capture):
                why = f"{what} is forbidden while a stream is captured, unless in relaxed mode"
                capture.refuse(Status.cudaErrorStreamCaptureUnsupported, why)

    def _forbids(self, capture: Capture) -> bool:
        """CUDA runtime API, cudaThreadExchangeStreamCaptureMode."""
        if capture.thread == threading.get_ident():
            return RELAXED not in (capture.mode, self._of_thread.mode)
        return capture.mode == self._of_thread.mode == GLOBAL

    def _captures(self) -> Iterator[Capture]:
        yield from (queue.capture for queue in list(self._queues.values()) if queue.capture is not None)
