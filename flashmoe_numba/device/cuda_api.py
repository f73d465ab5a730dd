"""Numba's CUDA target: the one module that imports it, so that its successor package is a change in one place.

`numba.cuda` must be the package numba-cuda, not the old target inside numba, which lacks most of what is used here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

with contextlib.suppress(ImportError):
    import _numba_cuda_redirector  # noqa: F401  its .pth file is not read where packages lie on PYTHONPATH
from llvmlite import ir
from numba import cuda, types

if getattr(cuda, "implementation", None) != "NVIDIA":
    raise ImportError("numba.cuda is Numba's old target, not the package numba-cuda")

from unittest import mock

from numba.cuda import cgutils
from numba.cuda.cudadecl import registry as typing_registry
from numba.cuda.cudaimpl import registry as lowering_registry
from numba.cuda.extending import core_models, intrinsic, overload, register_model
from numba.cuda.np.arrayobj import make_array, populate_array
from numba.cuda.typing.templates import AttributeTemplate

__all__ = [
    "AttributeTemplate",
    "cgutils",
    "compile_to_ltoir",
    "core_models",
    "cuda",
    "device_array",
    "element_pointer",
    "intrinsic",
    "ir",
    "link",
    "link_to_ptx",
    "lowering_registry",
    "make_array",
    "overload",
    "populate_array",
    "register_model",
    "types",
    "typing_registry",
]


Codes = list[tuple[str, bytes]]  # what a linker takes: (kind, code)


def element_pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """LLVM pointer to `array[index]` of a contiguous array."""
    return builder.gep(make_array(array_type)(context, builder, array).data, [index])


def device_array(array: Any) -> Any:
    """Somebody's array on the current GPU as one of Numba's, the same memory.

    Their stream is left out: it would be waited for here, and again by whoever takes Numba's array.
    """
    interface = array.__cuda_array_interface__ | {"stream": None}
    return cuda.from_cuda_array_interface(interface, owner=array, sync=False)


def compile_to_ltoir(
    kernel: Any, signature: tuple[Any, ...], capability: tuple[int, int], launch_bounds: tuple[int, int]
) -> Codes:
    """(kind, code) of a kernel and of everything it calls, for a compute capability; needs no device and no driver."""
    device = type("Device", (), {"compute_capability": capability})
    with mock.patch("numba.cuda.dispatcher.get_current_device", device):  # asked for nested functions, offline too
        codes, _ = cuda.compile_all(
            kernel, signature, device=False, abi="numba", cc=capability, output="ltoir", launch_bounds=launch_bounds
        )
    return [(getattr(code, "kind", "ltoir"), bytes(getattr(code, "data", code))) for code in codes]


def link(codes: Codes, architecture: str) -> tuple[bytes, str]:
    """(cubin, log) of compiled code, with registers and spills in the log; needs no device and no driver.

    Raises:
        RuntimeError: what the linker said.
    """
    from cuda.bindings.nvjitlink import get_info_log, get_info_log_size, get_linked_cubin, get_linked_cubin_size

    with _linked(codes, [f"-arch={architecture}", "-lto", "-verbose"]) as linker:
        cubin, log = bytearray(get_linked_cubin_size(linker)), bytearray(get_info_log_size(linker))
        get_linked_cubin(linker, cubin)
        get_info_log(linker, log)
    return bytes(cubin), log.decode(errors="replace")


def link_to_ptx(codes: Codes, architecture: str) -> bytes:
    """The same code linked and optimised as for a cubin, but left as PTX, the last form that has a specification.

    Raises:
        RuntimeError: what the linker said.
    """
    from cuda.bindings.nvjitlink import get_linked_ptx, get_linked_ptx_size

    with _linked(codes, [f"-arch={architecture}", "-lto", "-ptx"]) as linker:
        text = bytearray(get_linked_ptx_size(linker))
        get_linked_ptx(linker, text)
    return bytes(text).rstrip(b"\0")  # the size counts the end of a C string


@contextlib.contextmanager
def _linked(codes: Codes, options: list[str]) -> Iterator[int]:
    """A linker that has done its work, to be asked for what it made."""
    from cuda.bindings import nvjitlink

    kinds = {"ltoir": nvjitlink.InputType.LTOIR, "archive": nvjitlink.InputType.LIBRARY, "ptx": nvjitlink.InputType.PTX}
    handle = nvjitlink.create(len(options), options)
    try:
        for kind, code in codes:
            nvjitlink.add_data(handle, kinds[kind], code, len(code), kind)
        nvjitlink.complete(handle)
        yield handle
    except nvjitlink.nvJitLinkError as error:
        said = bytearray(nvjitlink.get_error_log_size(handle))
        nvjitlink.get_error_log(handle, said)
        raise RuntimeError(f"{error}: {said.decode(errors='replace')}") from None
    finally:
        nvjitlink.destroy(handle)
