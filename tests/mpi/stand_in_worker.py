"""One rank of a layer on GPUs that are none: its kernel interpreted, its segment mapped by the other rank."""

import sys
from pathlib import Path

import numpy as np
from cases import random_tokens, tiny_config
from mpi4py import MPI
from stand_ins import InterpretedGrid, build_nothing, make_stand_in

from flashmoe_numba import FlashMoE
from flashmoe_numba.build import build
from flashmoe_numba.ptx.stand_in import installed
from reference import Weights

CONFIG = tiny_config()
NUM_CALLS = 2
FOREVER = 1 << 40
DEADLINE_S = 86400.0  # of a clock that counts the fibers' steps: how long the other rank takes is no matter


def make_calls():
    """Tokens of all ranks, by calls."""
    return [random_tokens(CONFIG, [7 - call, 2 + call], seed=call) for call in range(NUM_CALLS)]


def main(folder):
    build.build = build_nothing
    rank = MPI.COMM_WORLD.rank
    launch = InterpretedGrid(CONFIG, rank, quiet_polls=FOREVER, max_switches=FOREVER)
    with installed(make_stand_in(launch, capability=(8, 0))) as cupy:
        with FlashMoE(
            CONFIG, Weights.random(CONFIG), comm=MPI.COMM_WORLD, backend="cuda", deadline_s=DEADLINE_S
        ) as layer:
            assert len(cupy.foreign) == CONFIG.num_ranks and cupy.cuda.runtime.getDeviceCount() == 2
            for call, x in enumerate(make_calls()):
                with cupy.cuda.Device(rank):
                    y = layer(cupy.asarray(x[rank])).get()
                routing = layer.routing
                np.savez(folder / f"{call}-{rank}.npz", y=y, idx=routing.topk_idx, weights=routing.topk_weights)
        assert cupy.foreign == []


if __name__ == "__main__":
    main(Path(sys.argv[1]))
