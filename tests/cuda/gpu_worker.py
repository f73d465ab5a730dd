"""One rank of test_gpu_mpi.py: `mpirun -n N python -m mpi4py gpu_worker.py SCENARIO FOLDER`. All ranks share GPU 0.

A rank leaves `rank0.npz` with results, or `rank0.txt` with the error that it was given.
"""

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
from cases import bits, random_routing, random_tokens
from gpu_cases import DEADLINE_S, kind_of, tensor_config, to_gpu, to_host

from flashmoe_numba import FlashMoE
from flashmoe_numba.processes.launch import guard_this_rank
from flashmoe_numba.processes.meeting import unlink_startup_segment
from reference import Weights

LOST_S = 4.0  # deadline where a rank is lost
VICTIM = 1
DTYPES = ("float16", "float32")
GUARDED = "FLASHMOE_TEST_GUARDED"


def make_config(num_ranks, dtype):
    return tensor_config(num_ranks=num_ranks, num_tokens=70, num_experts=2 * num_ranks, dtype=dtype)


def make_calls(config):
    """(tokens of each rank, keyword arguments): full, ragged, empty, routed outside."""
    n, full = config.num_ranks, config.num_tokens
    counts = [[full] * n, list(range(n)), [0] * n, [full] + [0] * (n - 1), [33] * n]
    calls = [(random_tokens(config, count, seed), {}) for seed, count in enumerate(counts)]
    idx, factors = random_routing(config, counts[-1], bias=50.0)
    return [*calls, (calls[-1][0], dict(topk_idx=idx, topk_weights=factors)), calls[0]]


def make_layer(config, comm, deadline_s=DEADLINE_S):
    weights = Weights.random(config, seed=4, bias=True).shard(comm.rank, comm.size)
    return FlashMoE(config, weights, comm=comm, backend="cuda", device=0, num_processors=6, deadline_s=deadline_s)


def results(comm, folder):
    saved = {}
    for dtype in DTYPES:
        config = make_config(comm.size, dtype)
        with make_layer(config, comm) as layer:
            for number, (x, routing) in enumerate(make_calls(config)):
                own = {name: parts[comm.rank] for name, parts in routing.items()}
                y = layer(to_gpu(x[comm.rank]), **own)
                layer.synchronize()
                assert kind_of(y) == "cupy"
                saved[f"{dtype}_{number}"] = bits(to_host(y, config.numpy_dtype))
                saved[f"{dtype}_{number}_idx"] = layer.routing.topk_idx
                saved[f"{dtype}_{number}_stats"] = np.array([layer.stats.epoch, layer.stats.received_rows])
    np.savez(folder / f"rank{comm.rank}.npz", **saved)


def lose(comm, folder, end):
    """All ranks call once; then the victim ends, in its way, and the others call again."""
    config = make_config(comm.size, "float16")
    (x, _), *_ = make_calls(config)
    layer = make_layer(config, comm, LOST_S)
    layer(to_gpu(x[comm.rank]))
    layer.synchronize()
    comm.Barrier()
    if comm.rank == VICTIM:
        end(layer)
        return
    start = time.monotonic()
    try:
        layer(to_gpu(x[comm.rank]))
        layer.synchronize()
    except Exception as error:
        write(folder / f"rank{comm.rank}.txt", f"{time.monotonic() - start:.2f} {type(error).__name__}: {error}")
        raise


def write(file, text):
    """All at once."""
    file.with_suffix(".new").write_text(text)
    file.with_suffix(".new").rename(file)


def never_calls(comm, folder):
    lose(comm, folder, lambda layer: wait_for_the_others(comm, folder))


def is_killed(comm, folder):
    lose(comm, folder, lambda layer: os.kill(os.getpid(), signal.SIGKILL))


def closes(comm, folder):
    """An error of its own: the others hear of it at once, and not at the deadline."""

    def leave(layer):
        layer._close(orderly=False)
        wait_for_the_others(comm, folder)

    lose(comm, folder, leave)


def wait_for_the_others(comm, folder):
    """mpirun ends all ranks when one leaves with an error; so stay until they have spoken."""
    end = time.monotonic() + 60
    while len(list(folder.glob("rank*.txt"))) < comm.size - 1 and time.monotonic() < end:
        time.sleep(0.05)


def main(scenario, folder):
    if os.environ.get(GUARDED):
        guard_this_rank(LOST_S)
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    comm.Barrier()  # all ranks have mpich's own segment, which would outlive a rank that dies
    if comm.rank == 0:
        unlink_startup_segment()
    globals()[scenario](comm, folder)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
