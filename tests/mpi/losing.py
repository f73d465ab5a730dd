"""`flashmoe`, but rank VICTIM stops itself (SIGSTOP) at a chosen moment: `losing.py MOMENT FOLDER ARGUMENT...`.

In call EPOCH, "before its blocks": the others are in the kernel, and wait for its dispatch flags. "after its dispatch":
it is in the kernel, and the others enter only when it stands still, so that they wait for its result flags. Before the
call, "before a meeting": the others wait for it outside the kernel.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np

from flashmoe_numba import cli
from flashmoe_numba.backends.cpu import CpuBackend
from flashmoe_numba.bench import launch

VICTIM, EPOCH = 2, 4
MEETING = "before call 3 "  # the first call warms up


def wait_for(condition, limit_s=60):
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > limit_s:
            raise TimeoutError("what the scenario waits for did not come")
        time.sleep(0.01)


def state(pid):
    """As in `ps`: R, S, T (stopped), Z; or "" when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def stop_here():
    os.kill(os.getpid(), signal.SIGSTOP)


def lose(moment, folder):
    """Prepare this process for its role, whatever its rank. The victim's pid is left in `folder`."""
    from flashmoe_numba.bench.world import MpiWorld

    honest_run, honest_meet, victim = CpuBackend.run, MpiWorld.meet, folder / "victim"

    def run(self, blocks, stop):
        problem, segments = blocks[0][1][1:3]
        if problem.epoch == EPOCH and moment != "before a meeting":
            if problem.rank_idx == VICTIM:
                write(victim, str(os.getpid()))
                if moment == "before its blocks":
                    stop_here()
                threading.Thread(target=stop_after_dispatch, args=(problem, segments), daemon=True).start()
            elif moment == "after its dispatch":
                wait_for(lambda: victim.exists() and state(victim.read_text()) in ("T", "Z", ""))
        honest_run(self, blocks, stop)

    def meet(self, what):
        if moment == "before a meeting" and self.rank_idx == VICTIM and what.startswith(MEETING):
            write(victim, str(os.getpid()))
            stop_here()
        honest_meet(self, what)

    CpuBackend.run, MpiWorld.meet = run, meet


def write(file, text):
    """All at once."""
    file.with_suffix(".new").write_text(text)
    file.with_suffix(".new").rename(file)


def stop_after_dispatch(problem, segments):
    words = ctypes.c_int64 * problem.num_experts
    flags = [np.ctypeslib.as_array(words.from_address(a + problem.dispatch_flag_at)) for a in segments.address.tolist()]
    mine = slice(VICTIM * problem.experts_per_rank, (VICTIM + 1) * problem.experts_per_rank)
    wait_for(lambda: all((there[mine] >> 32 == EPOCH).all() for there in flags))
    stop_here()


def main(moment, folder, *arguments):
    start = launch.start
    again = [sys.executable, *sys.argv[:3]]  # in place of `python -m flashmoe_numba`
    launch.start = lambda num_ranks, command, deadline_s: start(num_ranks, again + command[3:], deadline_s)
    lose(moment, Path(folder))
    return cli.main(list(arguments))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
