"""Ranks as processes that share one GPU, through IPC: the bits of virtual ranks, and what is said when a rank is lost.

Without MPS the processes take turns on the GPU, so this is slow; only what comes out is looked at.
"""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cases import assert_same_bits, bits
from gpu_cases import call, environment
from gpu_cases import make_layer as make_virtual_layer
from gpu_worker import DTYPES, GUARDED, LOST_S, VICTIM, make_calls, make_config

from reference import Weights

pytestmark = pytest.mark.mpi
pytest.importorskip("mpi4py", reason="the extra `mpi` is not installed")
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FLAG = rf"waited for the dispatch flag of rank {VICTIM} for expert \d here; it holds epoch 1"


@pytest.fixture(scope="module", autouse=True)
def built(gpu):
    """The kernels are in the cache, so that no rank builds one while the time of a test runs."""
    for dtype in DTYPES:
        config = make_config(2, dtype)
        make_virtual_layer(config, Weights.random(config, seed=4)).close()


def run(scenario, num_ranks, folder, **variables):
    from flashmoe_numba.processes.launch import find_mpirun

    command = [find_mpirun(), "-n", str(num_ranks), sys.executable, "-m", "mpi4py", str(HERE / "gpu_worker.py")]
    return subprocess.run(
        [*command, scenario, str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(ROOT) | variables,
        stdin=subprocess.DEVNULL,
        check=False,
    )


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_processes_give_the_bits_of_virtual_ranks(num_ranks, tmp_path):
    done = run("results", num_ranks, tmp_path)
    assert done.returncode == 0, done.stderr
    saved = [np.load(tmp_path / f"rank{rank}.npz") for rank in range(num_ranks)]
    for dtype in DTYPES:
        config = make_config(num_ranks, dtype)
        with make_virtual_layer(config, Weights.random(config, seed=4, bias=True)) as layer:
            for number, (x, routing) in enumerate(make_calls(config)):
                y = call(layer, x, **routing)
                for rank in range(num_ranks):
                    case = f"{dtype}, call {number}, rank {rank}"
                    assert_same_bits(saved[rank][f"{dtype}_{number}"], bits(y[rank]), case)
                    np.testing.assert_array_equal(
                        saved[rank][f"{dtype}_{number}_idx"], layer.routing[rank].topk_idx, case
                    )
                    stats = layer.stats[rank]
                    assert saved[rank][f"{dtype}_{number}_stats"].tolist() == [stats.epoch, stats.received_rows], case


@pytest.mark.parametrize("scenario", ["never_calls", "is_killed"])
def test_a_rank_that_does_not_come_is_named(scenario, tmp_path):
    done = run(scenario, 2, tmp_path, **{GUARDED: "1"})
    assert done.returncode != 0, done.stderr
    assert (tmp_path / "rank0.txt").exists(), f"rank 0 said nothing\n{done.stderr}"
    seconds, message = (tmp_path / "rank0.txt").read_text().split(" ", 1)
    begin = rf"FlashMoEError: rank 0, block \d+ \(OS block\) gave up in epoch 2: {FLAG}; \d+ flags missing"
    assert re.match(begin, message), message
    assert float(seconds) < 3 * LOST_S, message


def test_a_rank_that_leaves_is_named_at_once(tmp_path):
    done = run("closes", 2, tmp_path, **{GUARDED: "1"})
    seconds, message = (tmp_path / "rank0.txt").read_text().split(" ", 1)
    assert re.match(rf"FlashMoEError: rank 0 stopped: rank {VICTIM} left in epoch", message), (
        f"{message}\n{done.stderr}"
    )
    assert float(seconds) < LOST_S, message
