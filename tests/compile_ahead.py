"""Compile what tests need, several at a time: `python tests/compile_ahead.py layers | gpu`.

A kernel takes up to a minute, and is kept afterwards. Tests that run in several processes would compile it in each of
them; so `make test` and `make compile-test` have it done before they begin.
"""

import sys
import time

from built_variants import BACKWARDS, LINKED_BACKWARDS, VARIANTS
from cases import DTYPES, arithmetic_setting, tiny_config, usable_arithmetics
from ptx_kernels import QUEUE_BYTES, Bench, Counting
from ptx_processes import Processes

from flashmoe_numba import FlashMoE
from flashmoe_numba.build.build import build
from flashmoe_numba.ptx.linked import linked_ptx
from flashmoe_numba.tile_gemm.arithmetic import PAIRED_DTYPE
from reference import Weights
from reference.cache_folder import usable_cache_folder

NUM_PROCESSES = 2


def compile_layer(dtype, arithmetic):
    """Kernels of a layer on CPUs, forward and backward."""
    config = tiny_config(dtype=dtype)
    FlashMoE(config, Weights.random(config), save="rows", **arithmetic_setting(config, arithmetic)).close()


def compile_machine(is_in_step):
    """The machine that executes PTX, or the one whose warps run in step."""
    bench = Bench()
    if is_in_step:
        bench.machine = Counting(arena=bench.arena)
    bench.run("", bench.array(QUEUE_BYTES // 8, values=0), 0)


def compile_for_gpu(variant, is_linked):
    """A kernel for GPUs: as PTX, and as machine code where tests look at that."""
    linked_ptx(variant, usable_cache_folder())
    if is_linked:
        build(variant, usable_cache_folder())


LAYERS = [(dtype, name) for dtype in DTYPES for name in (usable_arithmetics() if dtype == PAIRED_DTYPE else ["fma"])]
TASKS = {  # (what is said of it, how, of what), those that take longest first
    "layers": [
        *((f"PTX machine{', in step' if in_step else ''}", compile_machine, (in_step,)) for in_step in (True, False)),
        *((f"{dtype} by {name}", compile_layer, (dtype, name)) for dtype, name in LAYERS),
    ],
    "gpu": [
        *((variant.name, compile_for_gpu, (variant, variant in LINKED_BACKWARDS)) for variant in BACKWARDS),
        *((variant.name, compile_for_gpu, (variant, True)) for variant in VARIANTS),
    ],
}  # fmt: skip


def run(task):
    """(name, seconds)"""
    name, compiles, arguments = task
    began = time.monotonic()
    compiles(*arguments)
    return name, time.monotonic() - began


if __name__ == "__main__":
    began = time.monotonic()
    with Processes(NUM_PROCESSES, "spawn") as processes:
        for name, seconds in processes.each(run, TASKS[sys.argv[1]]):
            print(f"{name}: {seconds:.0f} s", flush=True)
    print(f"compiled, or found in {usable_cache_folder()}, in {time.monotonic() - began:.0f} s")
