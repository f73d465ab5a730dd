"""One rank of processes that meet across hosts: `meeting_worker.py HOW`, see test_between_hosts.py."""

import ctypes
import os
import signal
import sys
import time

from flashmoe_numba.processes.launch import guard_this_rank
from flashmoe_numba.processes.together import MpiRanks

DEADLINE_S = 2.0
VICTIM = 3
SILENT = "a silent rank"  # what it calls itself then
PR_SET_NAME = 15


def main(how):
    guard_this_rank(DEADLINE_S)
    world = MpiRanks(DEADLINE_S)
    try:
        for number in range(5):
            if number == 3 and world.rank_idx == VICTIM:
                fail(how)
            if number == 2 and world.rank_idx == VICTIM and how == "slow":
                for _ in range(30):  # longer than the deadline, but at work
                    time.sleep(0.1)
                    world.note_progress()
            world.meet(f"before step {number}")
        values = world.gather({"rank": world.rank_idx, "here": world.num_ranks_here, "machines": world.machines})
        if values is not None:
            print(values, flush=True)
        sys.exit(world.agree(7 if world.rank_idx == 0 else 0))
    except Exception as error:
        world.abandon(error)


def fail(how):
    if how == "raise":
        raise ZeroDivisionError("planted")
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "silent":
        ctypes.CDLL(None).prctl(PR_SET_NAME, SILENT.encode(), 0, 0, 0)
        time.sleep(100)


if __name__ == "__main__":
    main(sys.argv[1])
