"""A rank of a process group is killed: the others raise a named error within their deadline, and then at once."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
MISSING = re.escape(
    "every rank must call the same modules equally often (see flashmoe_numba.torch.join, for calls without gradients)"
)
SAID = {
    "in_setup": r"TimeoutError: not all ranks came to a collective of the layer within 3 s \(setup_deadline_s\): .*",
    "in_making": r"FlashMoEError: rank [02] gave up at call 1: it makes a layer, rank [012] left because of an error "
    r"of its own",
    "in_another_order": r"FlashMoEError: rank [02] calls module 0 of these ranks, and rank 1 one of this number with "
    r"another router: every rank must make the same modules, with the same routers, in the same order",
    "without_its_group": r"FlashMoEError: rank [02] gave up at call 2: it makes a layer, rank [012] left because of an "
    r"error of its own",
    "in_adding": r"FlashMoEError: rank [02] gave up at call 0: it adds up gradients, rank [012] left because of an "
    r"error of its own",
    "between_calls": r"FlashMoEError: rank [02] gave up at call 2: it calls module 0 of these ranks, (rank 1 did not "
    rf"come within 3 s: {MISSING}, or it was late, or is gone|rank [02] left because of an error of its own)",
    "in_a_call": r"RuntimeError: rank [02].* gave up in epoch 4: waited for the result flag of rank 1, .*\nand later: "
    r"nothing is computed with these ranks any more, because a call failed: rank [02].* gave up in epoch 4: .*",
}


@pytest.mark.parametrize("scenario", SAID)
def test_a_rank_that_is_killed_is_named_by_the_others(scenario, tmp_path):
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests/mpi", HERE)))
    environment = dict(os.environ, PYTHONPATH=paths, OMP_NUM_THREADS="1")
    line = [sys.executable, str(HERE / "lost_rank_worker.py"), scenario, str(tmp_path)]
    processes = [
        subprocess.Popen(
            [*line, str(rank)], env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        for rank in range(3)
    ]
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert processes[1].returncode == -9, errors
    said = {file.stem: file.read_text() for file in tmp_path.glob("rank*.txt")}
    assert said.keys() == {"rank0", "rank2"}, errors
    for text in said.values():
        assert re.fullmatch(SAID[scenario], text, re.DOTALL), text
