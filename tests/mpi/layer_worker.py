"""One rank of the tests in test_layer_mpi.py: `mpirun -n N python -m mpi4py layer_worker.py SCENARIO FOLDER ...`.

A rank leaves what it found in the folder: `rank0.npz` with results, or `rank0.txt` with the error that it was given.
"""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from cases import DTYPES, assert_same_bits, bits, held_memory, random_routing, random_tokens, tiny_config
from losing import VICTIM, lose, wait_for, write

from flashmoe_numba import FlashMoE
from flashmoe_numba.checkpoints import Checkpoint
from flashmoe_numba.kernel import persistent
from flashmoe_numba.processes.launch import guard_this_rank
from flashmoe_numba.processes.meeting import unlink_startup_segment
from reference import Weights

DEADLINE_S = 3
GUARDED = "FLASHMOE_TEST_GUARDED"  # if set, mpirun does not learn of a rank's death before the others have spoken
NUM_CALLS, WARM_UP = 8_000, 2_000  # Python's own free lists grow by some hundred objects, most of them at the start


def make_config(num_ranks, **changes):
    return tiny_config(**(dict(num_ranks=num_ranks, num_experts=2 * num_ranks, num_topk=3, capacity=5) | changes))


def make_calls(config):
    """(tokens of each rank, keyword arguments of the call) of several calls: full, ragged, empty, routed outside."""
    n, rng = config.num_ranks, np.random.default_rng(n_seed := config.num_ranks)
    counts = [[config.num_tokens] * n, rng.integers(0, 8, n), [0] * n, [0] * (n - 1) + [7], rng.integers(0, 2, n)]
    calls = [(random_tokens(config, count, seed), {}) for seed, count in enumerate(counts)]
    ragged = rng.integers(0, 8, n)
    for bias in (0.0, 50.0):
        idx, weights = random_routing(config, ragged, n_seed, bias)
        calls.append((random_tokens(config, ragged, 9), dict(topk_idx=idx, topk_weights=weights)))
    return calls + calls[:1]


def make_weights(config, rank=None):
    """All experts, or what a rank brings: a shard, its experts only as made by itself, or everything."""
    if rank is None or rank % 3 == 0:
        return Weights.random(config, seed=4, bias=True)
    if rank % 3 == 1:
        return Weights.random(config, seed=4, bias=True).shard(rank, config.num_ranks)
    first = rank * config.num_experts_per_rank
    return Weights.random(config, seed=4, bias=True, experts=range(first, first + config.num_experts_per_rank))


def results(comm, folder):
    """Every call in every dtype, on layers that exist side by side."""
    saved = {}
    configs = [make_config(comm.size, dtype=dtype) for dtype in DTYPES]
    layers = [FlashMoE(c, make_weights(c, comm.rank), comm=comm, num_processors=1 + comm.rank % 3) for c in configs]
    for call in range(len(make_calls(configs[0]))):
        for config, layer in zip(configs, layers, strict=True):
            x, routing = make_calls(config)[call]
            y = layer(x[comm.rank], **{name: parts[comm.rank] for name, parts in routing.items()})
            key = f"{config.dtype}_{call}"
            saved[key] = bits(y)
            saved[f"{key}_idx"], saved[f"{key}_weights"] = layer.routing.topk_idx, layer.routing.topk_weights
            saved[f"{key}_stats"] = np.array([layer.stats.epoch, layer.stats.sent_rows, layer.stats.received_rows])
    for layer in layers:
        layer.close()
    np.savez(folder / f"rank{comm.rank}.npz", **saved)


def how_compiled(comm, folder):
    """Results of one call, and how the kernel came."""
    config = make_config(comm.size)
    with FlashMoE(config, make_weights(config), comm=comm) as layer:
        y = layer(random_tokens(config)[comm.rank])
    found, compiled = (
        sum(counter.values()) for counter in (persistent.stats.cache_hits, persistent.stats.cache_misses)
    )
    np.savez(folder / f"rank{comm.rank}.npz", y=y, found=found, compiled=compiled)


def many_calls(comm, folder):
    """With other numbers of tokens each time; their rows are those of the first call, because no pair is dropped."""
    config, rng = make_config(comm.size, capacity=None), np.random.default_rng(1)
    x = random_tokens(config)[comm.rank]
    with FlashMoE(config, make_weights(config), comm=comm) as layer:
        full = layer(x)
        for call in range(NUM_CALLS):
            if call == WARM_UP:
                before = held_memory()
            count = rng.integers(0, 8, comm.size)[comm.rank]
            assert_same_bits(layer(x[:count]), full[:count], f"{config}, call {call}, rank {comm.rank}, {count} tokens")
        growth = np.subtract(held_memory(), before)
    np.savez(folder / f"rank{comm.rank}.npz", growth=growth)


def different_config(comm, folder):
    config = make_config(comm.size)
    return FlashMoE(replace(config, tile_n=8) if comm.rank == VICTIM else config, make_weights(config), comm=comm)


def different_arithmetic(comm, folder):
    config = make_config(comm.size, dtype="bfloat16")
    name = "pairs" if comm.rank == VICTIM else "fma"
    return FlashMoE(config, make_weights(config), comm=comm, arithmetic=name)


def bad_weights(comm, folder):
    weights = make_weights(make_config(comm.size))
    if comm.rank == VICTIM:
        weights = replace(weights, down_proj=weights.down_proj[:, :, 1:])
    FlashMoE(make_config(comm.size), weights, comm=comm)


def others_experts(comm, folder):
    config = make_config(comm.size)
    shard = make_weights(config).shard(0 if comm.rank == VICTIM else comm.rank, comm.size)
    FlashMoE(config, shard, comm=comm)


def wrong_number_of_ranks(comm, folder):
    config = make_config(2 * comm.size)
    FlashMoE(config, make_weights(config), comm=comm)


def bad_tokens(comm, folder):
    config = make_config(comm.size)
    x = random_tokens(config)[comm.rank]
    with FlashMoE(config, make_weights(config), comm=comm, deadline_s=100) as layer:
        layer(x)
        layer(x.astype(np.float64) if comm.rank == VICTIM else x)


def late(comm, folder):
    """A rank enters its call when the others have given up."""
    config = make_config(comm.size)
    x = random_tokens(config)[comm.rank]
    layer = FlashMoE(config, make_weights(config), comm=comm, deadline_s=DEADLINE_S)
    layer(x)
    if comm.rank == VICTIM:
        wait_for(lambda: len(list(folder.glob("rank*.txt"))) == comm.size - 1)
    layer(x)


def lost(comm, folder, moment, signum):
    """SIGSTOP or SIGKILL in the middle of a call."""
    config = make_config(comm.size)
    x = random_tokens(config)[comm.rank]
    lose(moment, folder, signal.Signals[signum])
    layer = FlashMoE(config, make_weights(config), comm=comm, deadline_s=DEADLINE_S)
    while True:
        layer(x)


def raises_in_the_middle(comm, folder):
    config = make_config(comm.size)
    x = random_tokens(config)[comm.rank]
    with FlashMoE(config, make_weights(config), comm=comm, deadline_s=100) as layer:
        for call in range(20):
            if comm.rank == VICTIM and call == 7:
                raise ZeroDivisionError("planted")
            layer(x)


def checkpoint(comm, folder):
    """Each rank reads its own experts of a checkpoint."""
    with Checkpoint(folder / "checkpoint") as published:
        asked = dict(num_tokens=7, num_ranks=comm.size, rank_idx=comm.rank)
        config, weights = published.load(3, **asked)
        with FlashMoE(config, weights, comm=comm) as layer:
            y = layer(random_tokens(config)[comm.rank])
        np.savez(folder / f"rank{comm.rank}.npz", y=y, bytes_read=published.bytes_read)


def main(scenarios, scenario, folder, *arguments):
    """Run one of these functions, by its name."""
    if os.environ.get(GUARDED):
        guard_this_rank(DEADLINE_S)
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    comm.Barrier()  # all ranks have mpich's own segment, or each one of its own, which would outlive a rank that dies
    unlink_startup_segment()
    try:
        scenarios[scenario](comm, folder, *arguments)
    except Exception as error:
        write(folder / f"rank{comm.rank}.txt", f"{type(error).__name__}: {error}")
        # Whoever raises first ends all ranks (mpi4py), so wait until the others have said what they saw.
        expected = comm.size - scenario.startswith("lost")
        wait_for(lambda: len(list(folder.glob("rank*.txt"))) >= expected)
        raise


if __name__ == "__main__":
    main(globals(), sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
