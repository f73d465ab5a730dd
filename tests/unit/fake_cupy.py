"""As much of CuPy as gpu.py and arrays.py touch, on NumPy's arrays: who was the current device is what it tells."""

import ctypes
from types import SimpleNamespace

import numpy as np


class Array:
    """Values on a device."""

    __cuda_array_interface__ = None

    def __init__(self, values, device):
        self.values, self.device = np.ascontiguousarray(values), SimpleNamespace(id=device)
        self.shape, self.dtype = values.shape, values.dtype

    def view(self, dtype):
        return Array(self.values.view(dtype), self.device.id)


class CudaError(RuntimeError):
    pass


class Function:
    """A kernel, of which CuPy gives everybody the same."""

    def __init__(self, cupy):
        self._cupy, self.max_dynamic_shared_size_bytes = cupy, 48 << 10

    def __call__(self, grid, block, arguments, shared_mem):
        self._cupy.log.append(("launch", self._cupy.device, self._cupy.streams[-1]))


class FakeCupy:
    """Of a machine with two GPUs; `log` has what was done, on which device and in which stream."""

    BUS_IDS = ("0000:0A:00.0", "0000:0B:00.0")
    peers = True

    def __init__(self):
        cupy = self
        self.device, self.streams, self.log, self.mallocs = 0, [0], [], []
        self.ndarray, self.function = Array, Function(self)

        class Device:
            def __init__(self, index):
                self.index, self.outer = index, []

            def __enter__(self):
                self.outer.append(cupy.device)
                cupy.device = self.index

            def __exit__(self, *_):
                cupy.device = self.outer.pop()

        class Stream:
            def __init__(self, non_blocking=False, ptr=99):
                self.ptr, self.made_on = ptr, cupy.device

            @classmethod
            def from_external(cls, handle):
                version, ptr = handle.__cuda_stream__()
                assert version == 0
                return cls(ptr=ptr)

            def __enter__(self):
                assert self.made_on == cupy.device
                cupy.streams.append(self.ptr)

            def __exit__(self, *_):
                cupy.streams.pop()

            def synchronize(self):
                pass

            def is_capturing(self):
                cupy.log.append(("is_capturing", cupy.device, self.ptr))
                return False

            def wait_event(self, event):
                cupy.log.append(("wait", cupy.device, self.ptr))

        class Event:
            def __init__(self, disable_timing):
                pass

            def record(self, stream):
                cupy.log.append(("record", cupy.device, stream.ptr))

        class PinnedMemoryPool:
            def malloc(self, num_bytes):
                return bytearray(num_bytes)

        pointer = SimpleNamespace(UnownedMemory=lambda *a: a, MemoryPointer=lambda memory, offset: memory)
        self.cuda = SimpleNamespace(
            Device=Device, Stream=Stream, Event=Event, PinnedMemoryPool=PinnedMemoryPool, runtime=Runtime(self),
            **vars(pointer),
        )  # fmt: skip

    def RawModule(self, path, enable_cooperative_groups):
        return SimpleNamespace(get_function=lambda entry: self.function)

    def empty(self, shape, dtype):
        return Array(np.empty(shape, dtype), self.device)

    def asarray(self, x):
        return Array(x.values, self.device)

    def ascontiguousarray(self, x):
        assert x.device.id == self.device, "an array of another device would be copied"
        return x

    def stack(self, arrays):
        return Array(np.stack([array.values for array in arrays]), self.device)


class Runtime:
    CUDARuntimeError = CudaError

    def __init__(self, cupy):
        self._cupy = cupy

    def getDeviceCount(self):
        return 2

    def getDeviceProperties(self, device):
        return dict(name=b"fake", major=9, minor=0, multiProcessorCount=132, sharedMemPerBlockOptin=232448)

    def deviceGetPCIBusId(self, device):
        return FakeCupy.BUS_IDS[device]

    def deviceGetByPCIBusId(self, bus_id):
        if bus_id not in FakeCupy.BUS_IDS:
            raise CudaError("cudaErrorInvalidDevice")
        return FakeCupy.BUS_IDS.index(bus_id)

    def deviceCanAccessPeer(self, device, other):
        assert device != other, "CUDA answers no for one and the same"
        return self._cupy.peers

    def malloc(self, num_bytes):
        self._cupy.mallocs.append((self._cupy.device, num_bytes))
        raise CudaError("this fake has none")

    def memGetInfo(self):
        return 0, 1 << 30

    def memcpyAsync(self, target, source, num_bytes, kind, stream):
        self._cupy.log.append(("copy", self._cupy.device, stream))
        ctypes.memmove(target, source, num_bytes)
