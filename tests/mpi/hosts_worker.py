"""One rank of the tests in test_hosts_mpi.py: scenarios of other workers, on hosts of $FLASHMOE_TEST_RANKS_PER_HOST."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import layer_worker
import numpy as np
import training_worker
from cases import bits, random_tokens
from layer_worker import DEADLINE_S, main, make_config, make_weights
from losing import VICTIM

from flashmoe_numba import FlashMoE
from flashmoe_numba.heap.carrier import PIECE_BYTES, Carrier
from flashmoe_numba.heap.hosts import HostsHeap
from flashmoe_numba.layer import layer
from reference import MoEConfig, Weights

RANKS_PER_HOST = "FLASHMOE_TEST_RANKS_PER_HOST"
NUM_CALLS = 12


def pretend(ranks_per_host):
    """Layers that are made from here on have so many of their ranks on a host."""
    layer.make_heap = lambda config, comm, backend, deadline_s: HostsHeap(comm, deadline_s, ranks_per_host)


def large_config(num_ranks):
    """Packets of several pieces."""
    sizes = dict(num_tokens=700, hidden=2056, ffn=24, num_experts=num_ranks, num_topk=2)
    config = MoEConfig(num_ranks=num_ranks, **sizes)
    mean_rows = sizes["num_tokens"] * sizes["num_topk"] // num_ranks
    assert mean_rows * config.hidden * config.numpy_dtype.itemsize > 2 * PIECE_BYTES
    return config


def large(comm, folder):
    config = large_config(comm.size)
    with FlashMoE(config, Weights.random(config, seed=4), comm=comm, num_processors=1) as made:
        ys = [made(random_tokens(config, seed=call)[comm.rank]) for call in range(3)]
    np.savez(folder / f"rank{comm.rank}.npz", y=bits(np.stack(ys)))


def changing_calls(config):
    rng = np.random.default_rng(5)
    return [random_tokens(config, rng.integers(0, 8, config.num_ranks), call) for call in range(NUM_CALLS)]


def changing(comm, folder):
    config = make_config(comm.size)
    with FlashMoE(config, make_weights(config), comm=comm, deadline_s=DEADLINE_S) as made:
        ys = [made(x[comm.rank]) for x in changing_calls(config)]
    np.savez(folder / f"rank{comm.rank}.npz", **{str(call): bits(y) for call, y in enumerate(ys)})


def late_carriers(comm, folder):
    """Of every other rank: puts and messages pile up."""
    step, piles = Carrier.step, []

    def late_step(self):
        time.sleep(0.03)
        piles.append(int(self._wire[0]) - self._taken)
        return step(self)

    if comm.rank % 2:
        Carrier.step = late_step
    changing(comm, folder)
    assert comm.rank % 2 == 0 or max(piles) > 2, f"{max(piles)} puts at a time"


def paused(comm, folder):
    """A rank is stopped for longer than it may be without news, and for less than the deadline."""
    run, pause_s = Carrier.send_puts, DEADLINE_S / 2

    def send_puts(self):
        if self._taken > 20 and not hasattr(Carrier, "was_paused"):
            Carrier.was_paused = True
            subprocess.Popen(["sh", "-c", f"sleep {pause_s}; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)
        return run(self)

    if comm.rank == VICTIM:
        Carrier.send_puts = send_puts
    changing(comm, folder)
    assert comm.rank != VICTIM or Carrier.was_paused


def many_puts(comm, folder):
    """More to each other rank in a call than libfabric keeps by default."""
    config = make_config(comm.size, num_experts=70 * comm.size)
    FlashMoE(config, make_weights(config), comm=comm, deadline_s=DEADLINE_S).close()


def mixed(comm, folder):
    """The caller's own messages, and another layer, while calls are made."""
    config = make_config(comm.size)
    made = [FlashMoE(config, make_weights(config), comm=comm) for _ in range(2)]
    ys = []
    for x in changing_calls(config):
        request = comm.isend(comm.rank, (comm.rank + 1) % comm.size)
        ys.append(made[0](x[comm.rank]))
        assert comm.recv(source=(comm.rank - 1) % comm.size) == (comm.rank - 1) % comm.size
        request.wait()
        np.testing.assert_array_equal(bits(made[1](x[comm.rank])), bits(ys[-1]))
    for each in made:
        each.close()
    np.savez(folder / f"rank{comm.rank}.npz", **{str(call): bits(y) for call, y in enumerate(ys)})


if __name__ == "__main__":
    pretend(int(os.environ[RANKS_PER_HOST]))
    layer_worker.NUM_CALLS, layer_worker.WARM_UP = 3_000, 1_500
    main(vars(layer_worker) | vars(training_worker) | globals(), sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
