"""A GPU that is none: layers with backend="cuda" run their kernel's linked PTX on the machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reference.scalars import check_one_of, check_whole

from ..build import build as building
from ..build.variants import ARCHITECTURES, Variant
from .linked import check_text, is_backward, linked_ptx
from .machine import Machine
from .memory import Arena
from .profile import ProfilingMachine
from .stand_in import StandIn, installed

MEMORY_BYTES = 64 << 20
MOST_LATE_NS = 1_000_000  # beyond it everybody waits for what is late
MOST_MULTIPROCESSORS = 56  # their threads are as many as the machine can number


class SimulatedGpu:
    """What `simulated_gpu` gives.

    Args:
        cupy: the stand-in for CuPy, of which arrays come.
        machine: what launches run on.
    """

    def __init__(self, cupy: Any, machine: Machine) -> None:
        self.cupy, self.machine = cupy, machine


@contextlib.contextmanager
def simulated_gpu(
    architecture: str = "sm_90a",
    *,
    seed: int = 0,
    late_ns: int = 2000,
    blocks_per_gpu: int | None = None,
    multiprocessors: int = 8,
    memory_bytes: int = MEMORY_BYTES,
    text: str | None = None,
    profile: Variant | None = None,
) -> Iterator[SimulatedGpu]:
    """While this lasts, `import cupy` and NVIDIA's driver are stand-ins, and kernels run as PTX, by Numba on this CPU.

    Args:
        architecture: one of ARCHITECTURES.
        seed: of the order in which threads go on, and of what is late.
        late_ns: how long a released word may stay hidden at most, in the machine's time; 0 for never, at most
            1,000,000.
        blocks_per_gpu: so many blocks count as a GPU of their own, for what scopes mean; None: all are one.
        multiprocessors: of the GPU, at most 56; two blocks of most kernels are resident on one.
        memory_bytes: of all arrays together.
        text: the PTX to run instead of the kernel's own, of the same variant; of two kernels, of a layer with `save`,
            instead of the one that it says it is of.
        profile: count what this kernel does: the machine is then a `ProfilingMachine`.

    Raises:
        TypeError, ValueError: naming the rule. RuntimeError: another thread has one. `PtxFault` comes from calls of
            layers, and no call goes on this GPU after it, as after a failed kernel.
    """
    check_one_of("architecture", architecture, ARCHITECTURES)
    check_whole("seed", seed, 0)
    check_whole("late_ns", late_ns, 0, MOST_LATE_NS)
    if blocks_per_gpu is not None:
        check_whole("blocks_per_gpu", blocks_per_gpu, 1)
    check_whole("multiprocessors", multiprocessors, 1, MOST_MULTIPROCESSORS)
    check_whole("memory_bytes", memory_bytes, 1 << 20, 1 << 36)
    if not (text is None or isinstance(text, str)):
        raise TypeError(f"text must be a string, got {type(text).__name__}")
    arena = Arena(memory_bytes)
    how: dict[str, Any] = dict(arena=arena, seed=seed, late_ns=late_ns, blocks_per_gpu=blocks_per_gpu)
    machine = Machine(**how) if profile is None else ProfilingMachine(variant=profile, **how)
    texts: dict[str, str] = {}

    def build(variant: Variant, folder: Path) -> building.Kernel:
        """The kernel as the machine takes it: its text."""
        path = folder / f"{variant.name}.ptx"
        given = text if text is not None and is_backward(text) == variant.backward else None
        if given is not None:
            check_text(given, variant)
        texts[str(path)] = linked_ptx(variant, folder) if given is None else given
        entry = machine.program(texts[str(path)]).listing.entry
        return building.Kernel(
            variant=variant,
            path=path,
            entry=entry,
            registers=0,
            spill_bytes=0,
            stack_bytes=0,
            shared_bytes=0,
            warnings=(),
        )

    stand_in = StandIn(
        arena, machine.launch, capability=ARCHITECTURES[architecture], multiprocessors=multiprocessors,
        texts=texts.__getitem__, memory_bytes=memory_bytes,
    )  # fmt: skip
    machine.foreign = lambda: stand_in.foreign
    real = building.build
    with contextlib.closing(arena), contextlib.closing(stand_in), installed(stand_in):
        building.build = build
        try:
            yield SimulatedGpu(stand_in, machine)
        finally:
            building.build = real
            machine.foreign = tuple  # else machine and stand-in would keep each other
