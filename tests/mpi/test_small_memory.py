"""Layers in a /dev/shm of 64 MiB, as containers have it: what does not fit is refused before anybody touches it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flashmoe_numba.processes.launch import RANK_VARIABLES, find_mpirun

pytestmark = pytest.mark.mpi

HERE = Path(__file__).parent
IN_SMALL_MEMORY = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"', "sh"]
SETTINGS = {"PYTHONPATH": str(HERE.parents[1]), "MPIR_CVAR_CH4_NETMOD": "ofi", "HWLOC_XMLFILE": ""}


@pytest.fixture
def small_memory():
    """How a command is run in it."""
    try:
        subprocess.run([*IN_SMALL_MEMORY, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root may mount a small /dev/shm")
    return IN_SMALL_MEMORY


def test_layers_that_do_not_fit_together_are_refused_on_all_ranks(small_memory, tmp_path):
    command = [*small_memory, find_mpirun(), "-n", "2", sys.executable, str(HERE / "small_memory.py"), str(tmp_path)]
    own = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    done = subprocess.run(command, env=own | SETTINGS, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        rows = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert [(mib, made, different) for mib, made, different, _ in rows] == [(40, 1, 1), (16, 3, 1)]
        for mib, made, _, refusal in rows:
            said = re.match(r"the segments of 2 ranks need (\d+) MiB of /dev/shm, which has (\d+) MiB left", refusal)
            assert said, refusal
            needed, left = map(int, said.groups())
            assert mib - 2 <= needed <= mib and left < needed and left <= 64 - made * (mib - 2)
            assert ("others have claimed" in refusal) == (made > 0)
            assert refusal.endswith(
                ": use a smaller config.num_tokens, a config.capacity, close other layers, or enlarge it"
            )
