"""One rank of a soak: `soaking.py FOLDER ROUNDS CALLS`; what it leaves in the folder: started.py.

And `R.held`, JSON lines: for each layer of many calls how much it has grown by in the last two thirds of the calls, and
for each round what it holds at the end, with no layer open.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from hosts.stacks import tell_stacks

if __name__ == "__main__":
    tell_stacks(Path(sys.argv[1]))  # what follows takes seconds

from flashmoe_numba.processes.meeting import unlink_startup_segment
from flashmoe_numba.processes.mpi_environment import begin_mpi
from hosts.calls import Work, one_call, soak_layers
from hosts.held import Held, held

DEADLINE_S = 60.0
MANY_CALLS = 100  # of fewer a third need not have had the largest ones


def main(folder: Path, rounds: int, calls: int) -> None:
    comm = begin_mpi().COMM_WORLD
    comm.Barrier()
    unlink_startup_segment()
    (folder / f"{comm.rank}.pid").write_text(str(os.getpid()))
    try:
        make_rounds(comm, folder, rounds, calls)
    except Exception as error:
        (folder / f"{comm.rank}.error").write_text(f"{time.monotonic()} {type(error).__name__}: {error}")
        os._exit(3)  # MPI may wait for ever


def make_rounds(comm: Any, folder: Path, rounds: int, calls: int) -> None:
    with (
        (folder / f"{comm.rank}.digests").open("wb", buffering=0) as digests,
        (folder / f"{comm.rank}.held").open("w", buffering=1) as lines,
    ):
        for number, layers in enumerate(soak_layers(comm.size, rounds, calls)):
            for work, numbers in layers:
                grown = soak(work, numbers, comm, digests)
                if len(numbers) >= MANY_CALLS:
                    lines.write(json.dumps({"round": number, "grown": grown}) + "\n")
            comm.Barrier()  # nobody here has a layer
            lines.write(json.dumps({"round": number, "held": held()}) + "\n")
            comm.Barrier()


def soak(work: Work, numbers: range, comm: Any, digests: Any) -> Held:
    """Make the calls; what this process has grown by in the last two thirds."""
    middle = numbers[len(numbers) // 3]
    with work.make(comm=comm, deadline_s=DEADLINE_S) as layer:
        for call in numbers:
            if call == middle:
                before = held()
            digests.writelines(one_call(layer, work, call, comm.rank))
        return held().since(before)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
