"""One rank of a trial: `rank.py FOLDER NUM_TOKENS DEADLINE_S`; what it leaves in the folder: started.py.

It makes calls until there is a file `stop` with their number. With an error it ends when all have said theirs, which a
file `over` tells, because mpirun ends the others with it.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from flashmoe_numba.processes.launch import guard_this_rank
from hosts.stacks import tell_stacks

if __name__ == "__main__":  # before the imports that take a second
    guard_this_rank(float(sys.argv[3]))
    tell_stacks(Path(sys.argv[1]))

from flashmoe_numba import FlashMoE
from flashmoe_numba.processes.ending import end_all_ranks
from flashmoe_numba.processes.mpi_environment import begin_mpi
from hosts.calls import Work, one_call


def main(folder: Path, num_tokens: int, deadline_s: float) -> None:
    comm = begin_mpi().COMM_WORLD
    (folder / f"{comm.rank}.pid").write_text(str(os.getpid()))
    work = Work(num_ranks=comm.size, num_tokens=num_tokens)
    layer = work.make(comm=comm, deadline_s=deadline_s)
    try:
        make_calls(layer, work, comm.rank, folder)
        layer.close()
    except Exception as error:
        text = f"{time.monotonic()} {type(error).__name__}: {error}"
        (folder / f"{comm.rank}.new").write_text(text)
        (folder / f"{comm.rank}.new").rename(folder / f"{comm.rank}.error")
        until = time.monotonic() + 2 * deadline_s + 2
        while not (folder / "over").exists() and time.monotonic() < until:
            time.sleep(0.02)
        end_all_ranks(comm, 3)


def make_calls(layer: FlashMoE, work: Work, rank_idx: int, folder: Path) -> None:
    call, stop = 0, folder / "stop"
    with (folder / f"{rank_idx}.digests").open("wb", buffering=0) as digests:
        while not (stop.exists() and call >= int(stop.read_text() or 10**9)):
            digests.writelines(one_call(layer, work, call, rank_idx))
            call += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
