"""Small kernels by hand, for tests of the machine: a body becomes an entry that runs on an arena."""

import numpy as np

from flashmoe_numba.ptx import in_step, state
from flashmoe_numba.ptx.in_step import NUM_ACTIVITIES, NUM_COUNTERS, OS_BLOCK, WAITING, Profile
from flashmoe_numba.ptx.machine import Machine, run_to_end
from flashmoe_numba.ptx.memory import Arena

FAMILIES = {"p": "pred", "rs": "b16", "r": "b32", "f": "f32", "rd": "b64", "fd": "f64"}
COUNT = 40  # registers of each family
MOST_STEPS = 2_000_000  # each late store that a loop waits for may take 256,000
QUEUE_BYTES = 1024

PROLOGUE = """
ld.param.u64 %rd0, [kernel_param_0];
ld.param.u64 %rd1, [kernel_param_1];
mov.u32 %r0, %tid.x;
mov.u32 %r1, %ctaid.x;
mov.u32 %r2, %ntid.x;
mad.lo.s32 %r3, %r1, %r2, %r0;
cvt.u64.u32 %rd2, %r0;
cvt.u64.u32 %rd3, %r1;
cvt.u64.u32 %rd4, %r3;
setp.eq.s32 %p0, %r0, 0;
setp.eq.s32 %p1, %r3, 0;
setp.eq.s32 %p2, %r1, 0;
"""


def text_of(body, shared=""):
    """A module whose entry is `kernel(%rd0, %rd1)`.

    Every body finds in %rd2, %rd3 and %rd4 its thread, its block and both as one number, in %p0 whether it is the first
    thread of its block, in %p1 whether it is the first of all, in %p2 whether its block is the first.
    """
    registers = "".join(f".reg .{kind} %{name}<{COUNT}>;\n" for name, kind in FAMILIES.items())
    return (
        ".version 8.0\n.target sm_90a\n.address_size 64\n.extern .shared .align 1024 .b8 dynamic[];\n"
        ".visible .entry kernel(\n.param .u64 kernel_param_0,\n.param .u64 kernel_param_1\n)\n{\n"
        f"{registers}{shared}{PROLOGUE}{body}\nret;\n}}\n"
    )


class Bench:
    """An arena with arrays, and a machine on it.

    Args:
        options: of Machine.
    """

    def __init__(self, num_bytes=4 << 20, **options):
        self.arena = Arena(num_bytes)
        self.machine = Machine(arena=self.arena, **(dict(most_steps=MOST_STEPS) | options))

    def array(self, num_items, dtype=np.int64, granule=2, values=None):
        """An array that kernels see; never written unless values are given."""
        address = self.arena.allocate(num_items * np.dtype(dtype).itemsize, granule, "an array")
        array = self.arena.view(address, num_items * np.dtype(dtype).itemsize).view(dtype)
        if values is not None:
            array[:] = values
            self.arena.wrote(address, array.nbytes)
        return array

    def run(self, body, *arrays, blocks=1, threads=32, shared="", dynamic_bytes=0):
        """Launch; the kernel's arguments are the addresses of the arrays."""
        arguments = [array if isinstance(array, int) else array.ctypes.data for array in arrays]
        self.machine.launch(text_of(body, shared), "kernel", blocks, threads, arguments, dynamic_bytes)


class Counting(Machine):
    """Runs warps in step; block 1 is an OS block, and the queue is the first argument's array."""

    def execute(self, S, arguments):
        self.profile = Profile(
            counts=np.zeros((NUM_ACTIVITIES, NUM_COUNTERS), np.int64),
            steps=np.zeros((S.executed.size, in_step.STEP_COUNTERS), np.int64),
            activity=np.array([WAITING, OS_BLOCK][: S.blocks.size]),
            queues=np.array([[arguments[0], QUEUE_BYTES]]),
            task_bytes=np.array([64, 8]),
            together=np.zeros(state.WARP, np.int64),
            seen=np.zeros(8 * state.WARP, np.int64),
            banks=np.zeros(in_step.BANKS, np.int64),
        )
        run_to_end(in_step.run_in_step, S, self.profile)
