"""Gradients on several ranks, under mpirun and torchrun; what a rank has to find is in training_worker.py."""

import os
import subprocess

import pytest
from nightly import at_night_only
from test_ranks import HERE, ROOT, command


@pytest.mark.parametrize(
    ("launcher", "num_ranks"), [("mpirun", 4), ("torchrun", 2), *at_night_only(("mpirun", 2), ("torchrun", 4))]
)
def test_ranks_have_the_gradients_of_one(launcher, num_ranks, tmp_path):
    line = [*command(launcher, num_ranks), str(HERE / "training_worker.py"), launcher, str(tmp_path)]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", HERE)))
    environment = dict(os.environ, PYTHONPATH=paths, OMP_NUM_THREADS="1")
    done = subprocess.run(line, capture_output=True, text=True, timeout=250, env=environment, stdin=subprocess.DEVNULL)
    said = {file.stem: file.read_text() for file in sorted(tmp_path.glob("rank*.txt"))}
    assert said == {f"rank{rank}": "ok" for rank in range(num_ranks)}, "\n".join([*said.values(), done.stderr])
    assert done.returncode == 0, done.stderr
