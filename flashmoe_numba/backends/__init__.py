"""Backends: what it takes to run the blocks of one call. One file each, all giving the same few things.

`panel_width(config)`, `make_scratch(config)`, `prepare(arguments)` (compile for these arguments), and
`run(blocks, stop)`, which returns when every block has.
"""

from __future__ import annotations

from typing import Any

BACKENDS = ("cpu", "fibers")


def make_backend(name: str, num_blocks: int, **settings: Any) -> Any:
    """The backend of that name for `num_blocks` blocks in this process; imports what it needs only now."""
    if name == "cpu":
        from .cpu import CpuBackend

        return CpuBackend(num_blocks, **settings)
    if name == "fibers":
        from .fibers import FiberBackend

        return FiberBackend(num_blocks, **settings)
    raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}")
