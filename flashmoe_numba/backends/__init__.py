"""Backends: what it takes to run the blocks of one call. One file each, all giving the same few things.

`pack(...)` (weights for the tile GEMM), `make_scratch(config)`, `prepare(arguments, folder)` (compile for these), and
`deadline_ns`; `run(blocks, stop)`, which returns when every block has, and `leave(problem, segments)`, which makes the
blocks of all ranks do so early.
"""

from __future__ import annotations

from typing import Any

SETTINGS: dict[str, tuple[str, ...]] = {"cpu": (), "fibers": ("seed", "lanes", "preempt")}


def check_backend(name: Any, settings: dict[str, Any]) -> None:
    """Raise a TypeError or ValueError if there is no such backend or it has no such setting."""
    if name not in SETTINGS:
        raise ValueError(f"backend must be one of {', '.join(SETTINGS)}; got {name!r}")
    for setting in settings:
        if setting not in SETTINGS[name]:
            known = ", ".join(SETTINGS[name]) or "none"
            raise TypeError(f"backend {name!r} has no setting {setting!r}; its settings: {known}")


def make_backend(name: str, num_blocks: int, **settings: Any) -> Any:
    """The backend of that name for `num_blocks` blocks in this process; imports what it needs only now."""
    if name == "cpu":
        from .cpu import CpuBackend

        return CpuBackend(num_blocks)
    from .fibers import FiberBackend

    return FiberBackend(**settings)
