"""What a world runs on, whatever its calls: a simulated GPU by the world's seed, late stores on."""

import time
from dataclasses import dataclass, replace

import numpy as np

from flashmoe_numba.ptx.linked import is_backward
from flashmoe_numba.ptx.simulated import simulated_gpu

DEADLINE_S = 20.0  # of the machine's time
LATE_NS = 2000
MULTIPROCESSORS = 16  # two blocks on each


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run gave, and what the kernel of the world's variant did.

    Args:
        results: of every call that went well, for each rank its arrays by name.
        executed: int64 [steps], how often each ran.
    """

    results: list[list[dict[str, np.ndarray]]]
    text: str
    executed: np.ndarray
    steps: int
    poisoned_rows: int
    seconds: float


def simulated(world, run_calls, *, text=None, seed=None, num_processors=None, own_gpus=None, late_ns=LATE_NS):
    """Run a world by `run_calls(world, gpu)`, which gives the results of its calls.

    Args:
        text: PTX to run in place of the variant's own.
        seed, num_processors, own_gpus: in place of the world's.

    Raises:
        PtxFault: what the machine found wrong.
    """
    started = time.monotonic()
    world = replace(
        world,
        seed=world.seed if seed is None else seed,
        num_processors=num_processors or world.num_processors,
        own_gpus=world.own_gpus if own_gpus is None else own_gpus,
    )
    own = world.num_processors + 1 if world.own_gpus else None
    how = dict(seed=world.seed, late_ns=late_ns, blocks_per_gpu=own, text=text, multiprocessors=MULTIPROCESSORS)
    with simulated_gpu(world.variant.architecture, **how) as gpu:
        results, machine = run_calls(world, gpu), gpu.machine
        of_variant = [ran for ran in machine.executed.items() if is_backward(ran[0]) == world.variant.backward]
        ((text, executed),) = of_variant
        return Outcome(
            results=results, text=text, executed=executed, steps=machine.steps, poisoned_rows=machine.poisoned_rows,
            seconds=time.monotonic() - started,
        )  # fmt: skip
