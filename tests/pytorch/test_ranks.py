"""Modules and models on several ranks, under mpirun and torchrun; what a rank has to find is in ranks_worker.py."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from nightly import at_night_only

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
SCENARIOS = ("modules", "layers", "nobody_here", "models")


def command(launcher, num_ranks):
    if launcher == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    pytest.importorskip("mpi4py", reason="the extra `mpi` is not installed")
    beside = Path(sys.executable).parent / "mpirun"
    return [
        str(beside) if beside.exists() else shutil.which("mpirun"),
        "-n",
        str(num_ranks),
        sys.executable,
        "-m",
        "mpi4py",
    ]


BY_DAY = [("mpirun", 2), ("torchrun", 4)]
BY_NIGHT = at_night_only(("mpirun", 1), ("mpirun", 4), ("torchrun", 1), ("torchrun", 2))


@pytest.mark.parametrize(("launcher", "num_ranks"), [*BY_DAY, *BY_NIGHT])
def test_ranks_compute_what_one_rank_does(launcher, num_ranks, tmp_path):
    scenarios = [*SCENARIOS, *(["expert_parallel"] if launcher == "torchrun" and num_ranks > 1 else [])]
    line = [*command(launcher, num_ranks), str(HERE / "ranks_worker.py"), launcher, str(tmp_path), *scenarios]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", HERE)))
    environment = dict(os.environ, PYTHONPATH=paths, OMP_NUM_THREADS="1")
    done = subprocess.run(line, capture_output=True, text=True, timeout=250, env=environment, stdin=subprocess.DEVNULL)
    said = {file.stem: file.read_text() for file in sorted(tmp_path.glob("rank*.txt"))}
    assert said == {f"rank{rank}": "ok" for rank in range(num_ranks)}, "\n".join([*said.values(), done.stderr])
    assert done.returncode == 0, done.stderr
