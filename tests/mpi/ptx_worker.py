"""One rank of a layer whose kernel runs as PTX on a machine of its own: `ptx_worker.py KIND FOLDER SCENARIO`."""

import sys
import time
from pathlib import Path

import numpy as np
from cases import random_tokens, tiny_config
from losing import wait_for, write
from mpi4py import MPI

from flashmoe_numba import FlashMoE
from flashmoe_numba.errors import FlashMoEError
from flashmoe_numba.ptx.simulated import simulated_gpu
from reference import Weights

KINDS = {
    "lanes": dict(dtype="float32"),
    "wgmma": dict(dtype="float16", hidden=72, ffn=40, tile_n=128, tile_m=64, tile_m_min=16),
}
NUM_CALLS = 2
DEADLINE_S, FOREVER_S = 3, 86400.0  # how long the other rank takes on a busy machine is no matter


def make_config(kind):
    return tiny_config(**KINDS[kind])


def make_calls(config):
    """Tokens of all ranks, by calls."""
    return [random_tokens(config, [7 - call, 2 + call], seed=call) for call in range(NUM_CALLS)]


def results(gpu, layer, config, rank, folder):
    for call, x in enumerate(make_calls(config)):
        y = gpu.cupy.asnumpy(layer(gpu.cupy.asarray(x[rank])))
        routing = layer.routing
        np.savez(folder / f"{call}-{rank}.npz", y=y, idx=routing.topk_idx, weights=routing.topk_weights)


def alone(gpu, layer, config, rank, folder):
    """Rank 0 calls; rank 1 does not until that has given up. Both keep after how long and what they were told."""
    begin = time.monotonic()
    try:
        if rank == 0:
            layer(gpu.cupy.asarray(make_calls(config)[0][0]))
            layer.synchronize()
        else:
            wait_for((folder / "rank0.txt").exists)
            layer.close()
    except FlashMoEError as error:
        write(folder / f"rank{rank}.txt", f"{time.monotonic() - begin}\n{error}")


def main(kind, folder, scenario):
    comm, config = MPI.COMM_WORLD, make_config(kind)
    deadline_s = DEADLINE_S if scenario is alone else FOREVER_S
    with simulated_gpu("sm_90a", seed=comm.rank) as gpu, gpu.cupy.cuda.Device(comm.rank):
        layer = FlashMoE(config, Weights.random(config), comm=comm, backend="cuda", deadline_s=deadline_s)
        assert len(gpu.cupy.foreign) == config.num_ranks
        scenario(gpu, layer, config, comm.rank, folder)
        layer.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), globals()[sys.argv[3]])
