"""One rank of test_small_memory.py: `mpirun -n 2 python small_memory.py FOLDER`, in a /dev/shm of 64 MiB.

Layers of a size are made until one is refused; then those that there are make a call. A rank leaves a line of each size
in the folder: the size in MiB of all ranks, layers that were made, digests of the results, and the refusal.
"""

import json
import sys
from pathlib import Path

import numpy as np
from mpi4py import MPI

from flashmoe_numba import FlashMoE
from flashmoe_numba.processes.meeting import unlink_startup_segment
from reference import Layout, MoEConfig, Weights

SIZES = (40, 16)


def config_of(mib):
    """The largest layer of two ranks whose segments need at most so much."""
    tokens = 1
    sizes = dict(num_ranks=2, hidden=64, ffn=16, num_experts=4, num_topk=1)
    while 2 * Layout(MoEConfig(num_tokens=tokens + 500, **sizes)).num_bytes <= mib * 2**20:
        tokens += 500
    return MoEConfig(num_tokens=tokens, **sizes)


def fill(comm, mib):
    config, layers, refusal = config_of(mib), [], ""
    weights = Weights.random(config, seed=0)
    while not refusal and len(layers) < 5:
        try:
            layers.append(FlashMoE(config, weights, comm=comm, num_processors=1))
        except ValueError as error:
            refusal = str(error)
    x = np.random.default_rng(comm.rank).standard_normal((config.num_tokens, config.hidden)).astype(np.float32)
    digests = {hash(layer(x).tobytes()) for layer in layers}
    made = len(layers)
    for layer in layers:
        layer.close()
    return mib, made, len(digests), refusal


if __name__ == "__main__":
    comm = MPI.COMM_WORLD
    comm.Barrier()
    if comm.rank == 0:
        unlink_startup_segment()
    rows = [fill(comm, mib) for mib in SIZES]
    Path(sys.argv[1], f"rank{comm.rank}.json").write_text(json.dumps(rows))
