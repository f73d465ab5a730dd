"""One rank of a trial: `rank.py FOLDER NUM_TOKENS DEADLINE_S`.

In the folder it leaves `R.pid`, `R.digests` with a digest for each of its calls, and if a call failed `R.error`: when,
by `time.monotonic`, and what was said. It makes calls until there is a file `stop` with their number.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from flashmoe_numba import FlashMoE
from flashmoe_numba.processes.launch import guard_this_rank
from flashmoe_numba.processes.mpi_environment import begin_mpi

sys.path.insert(0, str(Path(__file__).parents[1]))
from hosts.calls import digest, make_config, make_weights, tokens_of


def main(folder: Path, num_tokens: int, deadline_s: float) -> None:
    guard_this_rank(deadline_s)
    comm = begin_mpi().COMM_WORLD
    (folder / f"{comm.rank}.pid").write_text(str(os.getpid()))
    config = make_config(comm.size, num_tokens)
    layer = FlashMoE(config, make_weights(config), comm=comm, num_processors=1, deadline_s=deadline_s)
    try:
        make_calls(layer, comm.rank, folder)
        layer.close()
    except Exception as error:
        text = f"{time.monotonic()} {type(error).__name__}: {error}"
        (folder / f"{comm.rank}.new").write_text(text)
        (folder / f"{comm.rank}.new").rename(folder / f"{comm.rank}.error")
        time.sleep(
            2 * deadline_s + 2
        )  # others may take so long to say the same, and mpirun ends them when this rank ends
        os._exit(3)  # MPI may wait for the lost for ever


def make_calls(layer: Any, rank_idx: int, folder: Path) -> None:
    call, stop = 0, folder / "stop"
    with (folder / f"{rank_idx}.digests").open("wb", buffering=0) as digests:
        while not (stop.exists() and call >= int(stop.read_text() or 10**9)):
            digests.write(digest(layer(tokens_of(layer.config, call)[rank_idx])))
            call += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
