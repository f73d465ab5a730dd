"""Two processes, each with a stand-in for a GPU: they map each other's segments, and the layer equals the oracle."""

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

HERE = Path(__file__).parent
sys.path.append(str(HERE))
from stand_in_worker import CONFIG, make_calls  # noqa: E402


def test_ranks_on_gpus_of_their_own_equal_the_oracle(tmp_path, outside_mpirun):
    command = [launch.find_mpirun(), "-n", "2", sys.executable, "-m", "mpi4py", HERE / "stand_in_worker.py", tmp_path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)])}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    for call, x in enumerate(make_calls()):
        files = [np.load(tmp_path / f"{call}-{rank}.npz") for rank in range(CONFIG.num_ranks)]
        routings = [Routing(file["idx"], file["weights"]) for file in files]
        assert_equals_oracle([file["y"] for file in files], x, Weights.random(CONFIG), CONFIG, routings)
