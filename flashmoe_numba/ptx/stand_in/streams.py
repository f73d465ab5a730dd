"""CuPy's Device, Stream, Event and Graph. The stand-in gives each class its `queues`."""

from __future__ import annotations

import weakref
from typing import Any, ClassVar, Self

from .errors import CUDARuntimeError, Status
from .queues import RELAXED, Capture, Queues, Step


class Device:
    """A device, and the context in which it is the current one; None is the current one."""

    queues: ClassVar[Queues]

    def __init__(self, device: int | None = None) -> None:
        self.id = self.queues.device if device is None else device
        self.queues.check_device(self.id)

    def __enter__(self) -> Self:
        self.queues.enter_device(self.id)
        return self

    def __exit__(self, *_: object) -> None:
        self.queues.leave_device()

    def synchronize(self) -> None:
        with self:
            self.queues.wait_for_device()


class Stream:
    """A new stream of the current device, or somebody's (`from_external`); a context in which it is the current one."""

    queues: ClassVar[Queues]

    def __init__(self, null: bool = False, non_blocking: bool = False) -> None:
        self.ptr = 0 if null else self.queues.open(blocking=not non_blocking)
        self.device_id = self.queues.device
        if not null:
            weakref.finalize(self, self.queues.close, self.ptr)

    @classmethod
    def from_external(cls, other: Any) -> Self:
        """The stream of an object with `__cuda_stream__`."""
        version, pointer = other.__cuda_stream__()
        if version != 0:
            raise ValueError(f"__cuda_stream__ must be of version 0, got {version}")
        return cls.of(pointer)

    @classmethod
    def of(cls, pointer: int) -> Self:
        stream = cls.__new__(cls)
        stream.ptr, stream.device_id = pointer, cls.queues.device
        return stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.ptr

    def __enter__(self) -> Self:
        self.queues.enter_stream(self.ptr)
        return self

    def __exit__(self, *_: object) -> None:
        self.queues.leave_stream()

    def synchronize(self) -> None:
        self.queues.wait_for_stream(self.ptr)

    def wait_event(self, event: Event) -> None:
        """Let the stream go on only after an event."""
        capture = self.queues.queue(self.ptr).capture
        if capture is None and event.capture is not None:
            raise NotImplementedError("a stream that waits for a captured event joins its capture: not in the stand-in")
        if capture is not None and event.capture is not capture:
            why = "a captured stream cannot wait for an event that was recorded outside of the capture"
            capture.refuse(Status.cudaErrorStreamCaptureIsolation, why)
        self.queues.enqueue(self.ptr, _nothing)

    def begin_capture(self, mode: int | None = None) -> None:
        """From now on record; `mode` is a cudaStreamCaptureMode."""
        self.queues.begin_capture(self.ptr, RELAXED if mode is None else mode)

    def end_capture(self) -> Graph:
        return Graph(self.queues, self.queues.end_capture(self.ptr))

    def is_capturing(self) -> bool:
        return self.queues.queue(self.ptr).capture is not None


class Event:
    """A place in a stream. All work before it is done once it is recorded, but for that of a capture."""

    def __init__(self, disable_timing: bool = False) -> None:
        self.capture: Capture | None = None

    def record(self, stream: Stream) -> None:
        stream.queues.enqueue(stream.ptr, _nothing)
        self.capture = stream.queues.queue(stream.ptr).capture

    @property
    def done(self) -> bool:
        self._refuse_captured()
        return True

    def synchronize(self) -> None:
        self._refuse_captured()

    def _refuse_captured(self) -> None:
        if self.capture is not None:
            self.capture.valid = False
            why = "an event that was recorded in a capture can be neither asked nor waited for"
            raise CUDARuntimeError(Status.cudaErrorCapturedEvent, why)


class Graph:
    """What a captured stream did."""

    def __init__(self, queues: Queues, steps: list[Step]) -> None:
        self._queues, self._steps = queues, steps

    def launch(self, stream: Stream | None = None) -> None:
        """Do it again, in the order of `stream` (default: the current one)."""
        self._queues.enqueue(self._queues.stream if stream is None else stream.ptr, self._replay)

    def _replay(self) -> None:
        for step in self._steps:
            step()


def _nothing() -> None:
    pass
