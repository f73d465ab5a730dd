"""Two processes, each with a machine for the kernel's PTX: they share segments, and the layer equals the oracle."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cases import assert_equals_oracle

from flashmoe_numba.processes import launch
from reference import Routing, Weights

pytestmark = pytest.mark.mpi
pytest.importorskip("mpi4py", reason="the extra `mpi` is not installed")
pytest.importorskip("numba_cuda", reason="the extra `compile` is not installed")

HERE = Path(__file__).parent
sys.path.append(str(HERE))
from ptx_worker import DEADLINE_S, KINDS, make_calls, make_config  # noqa: E402


def run(kind, folder, scenario):
    command = [launch.find_mpirun(), "-n", "2", sys.executable, "-m", "mpi4py", HERE / "ptx_worker.py"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)])}
    arguments = [*command, kind, folder, scenario]
    done = subprocess.run([*map(str, arguments)], env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_on_machines_of_their_own_equal_the_oracle(kind, tmp_path, outside_mpirun):
    run(kind, tmp_path, "results")
    config = make_config(kind)
    for call, x in enumerate(make_calls(config)):
        files = [np.load(tmp_path / f"{call}-{rank}.npz") for rank in range(config.num_ranks)]
        routings = [Routing(file["idx"], file["weights"]) for file in files]
        y = [file["y"].view(config.numpy_dtype) for file in files]
        assert_equals_oracle(y, x, Weights.random(config), config, routings)


def test_a_rank_that_never_comes_is_named_when_the_deadline_is_over(tmp_path, outside_mpirun):
    run("lanes", tmp_path, "alone")
    begins = "rank 0, block ", "rank 1 stopped: rank 0, block "
    for rank, begin in enumerate(begins):
        seconds, message = (tmp_path / f"rank{rank}.txt").read_text().split("\n", 1)
        assert message.startswith(begin) and "gave up in epoch 1: waited for the dispatch flag of rank 1" in message
        assert rank == 1 or float(seconds) >= DEADLINE_S
