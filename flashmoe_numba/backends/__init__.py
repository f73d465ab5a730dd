"""Backends: memory for kernels, and what it takes to run the blocks of a call. One file each, all giving the same
(protocols.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from reference import Hosts, MoEConfig
from reference.code_cache import compiler_is_off

if TYPE_CHECKING:
    from .protocols import Backend

SETTINGS: dict[str, tuple[str, ...]] = {
    "cpu": ("arithmetic",),
    "cuda": ("device", "tf32"),
    "fibers": ("seed", "lanes", "preempt"),
}


def check_backend(name: Any, settings: Mapping[str, Any]) -> None:
    """Raise a TypeError or ValueError if there is no such backend, it has no such setting, or cannot compile."""
    if name not in SETTINGS:
        raise ValueError(f"backend must be one of {', '.join(SETTINGS)}; got {name!r}")
    for setting in settings:
        if setting not in SETTINGS[name]:
            known = ", ".join(SETTINGS[name]) or "none"
            raise TypeError(f"backend {name!r} has no setting {setting!r}; its settings: {known}")
    if name != "fibers" and compiler_is_off():
        rule = "cannot compile its kernel, because NUMBA_DISABLE_JIT is set"
        raise ValueError(f'backend {name!r} {rule}: unset it, or use backend="fibers", which needs no compiler')


def make_backend(name: str, config: MoEConfig, first_rank: int, hosts: Hosts, **settings: Any) -> Backend:
    """The backend of that name; imports what it needs only now.

    Args:
        first_rank: of this process. Its place among the ranks of its host decides about its GPU where the settings do
            not.
    """
    if name == "cpu":
        from .cpu import CpuBackend

        return CpuBackend(**settings)
    if name == "fibers":
        from .fibers import FiberBackend

        return FiberBackend(**settings)
    from ..gpu.gpu import Gpu
    from .cuda import CudaBackend

    device = settings.get("device")
    place = hosts.of_rank[:first_rank].count(hosts.of_rank[first_rank])
    if device is None and place > 0:
        device = place % max(1, Gpu.count())
    return CudaBackend(config, Gpu(device), settings.get("tf32", False), "ipc" if hosts.is_one else "nvshmem")
