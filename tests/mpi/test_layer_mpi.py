"""The layer under mpirun: the bits of the threads' results, and what every rank is told when one goes wrong."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cases import assert_same_bits, bits

from flashmoe_numba import FlashMoE

pytestmark = pytest.mark.mpi
pytest.importorskip("mpi4py", reason="the extra `mpi` is not installed")

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.append(str(HERE))
import layer_worker  # noqa: E402
from layer_worker import VICTIM, make_calls, make_config, make_weights  # noqa: E402

SHARED_MEMORY = Path("/dev/shm")


def mpirun():
    """The one beside this interpreter, else the one on the path."""
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    assert found, "mpi4py is installed, but mpirun is neither beside the interpreter nor on the path"
    return found


def leftovers(before, folder):
    """Shared memory that was not there before, and processes that still work for `folder`."""
    memory = set(os.listdir(SHARED_MEMORY)) - before if SHARED_MEMORY.is_dir() else set()
    processes = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder) in entry.read_text():
                processes.append(entry.parent.name)
        except OSError:
            pass  # it ended meanwhile
    return sorted(memory) + processes


def run(scenario, num_ranks, folder):
    """(exit status, stderr, {rank: its error}) of one mpirun; nothing is left behind."""
    before = set(os.listdir(SHARED_MEMORY)) if SHARED_MEMORY.is_dir() else set()
    command = [mpirun(), "-n", str(num_ranks), sys.executable, "-m", "mpi4py", str(HERE / "layer_worker.py")]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    command += [scenario, str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=100, env=environment, stdin=subprocess.DEVNULL
    )
    for _ in range(100):
        if not leftovers(before, folder):
            break
        time.sleep(0.1)
    assert leftovers(before, folder) == [], f"{scenario}: left behind\n{done.stderr}"
    errors = {int(file.stem[4:]): file.read_text() for file in folder.glob("rank*.txt")}
    return done.returncode, done.stderr, errors


def assert_named(message, *parts):
    missing = [part for part in parts if part not in message]
    assert not missing, f"{message!r} does not say {missing}"


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_results_are_those_of_threads(num_ranks, tmp_path):
    status, err, errors = run("results", num_ranks, tmp_path)
    assert status == 0 and not errors, f"{errors}\n{err}"
    saved = [np.load(tmp_path / f"rank{rank}.npz") for rank in range(num_ranks)]
    for dtype in ("float32", "bfloat16"):
        config = make_config(num_ranks, dtype=dtype)
        with FlashMoE(config, make_weights(config), num_processors=2) as layer:
            for call, (x, routing) in enumerate(make_calls(config)):
                y = layer(x, **routing)
                for rank, (part, chosen, stats) in enumerate(zip(y, layer.routing, layer.stats, strict=True)):
                    key, case = f"{dtype}_{call}", f"{config}, call {call}, rank {rank} of {num_ranks}"
                    np.testing.assert_array_equal(saved[rank][key], bits(part), err_msg=case)
                    np.testing.assert_array_equal(saved[rank][f"{key}_idx"], chosen.topk_idx, err_msg=case)
                    assert_same_bits(saved[rank][f"{key}_weights"], chosen.topk_weights, case)
                    expected = [stats.epoch, stats.sent_rows, stats.received_rows]
                    assert saved[rank][f"{key}_stats"].tolist() == expected, case


@pytest.mark.parametrize(
    ("scenario", "own", "others"),
    [
        ("different_config", ["ValueError", "rank 0", "tile_n=4", "rank 1", "tile_n=8"], None),
        ("bad_weights", ["ValueError", "down_proj", "[6, 9, 6]", "[6, 9, 5]"], ["rank 1", "down_proj", "[6, 9, 5]"]),
        ("others_experts", ["ValueError", "rank_idx=1"], ["rank 1", "rank_idx=1"]),
        ("wrong_number_of_ranks", ["ValueError", "comm", "num_ranks=6", "got 3"], None),
        ("bad_tokens", ["TypeError", "x", "float32", "float64"], ["FlashMoEError", "rank 1 left in epoch"]),
        ("raises_in_the_middle", ["ZeroDivisionError", "planted"], ["FlashMoEError", "rank 1 left in epoch 7"]),
    ],
)
def test_an_error_on_one_rank_is_raised_on_all(scenario, own, others, tmp_path):
    status, err, errors = run(scenario, 3, tmp_path)
    assert status != 0, err
    assert sorted(errors) == [0, 1, 2], f"{errors}\n{err}"
    for rank, message in errors.items():
        assert_named(message, *(own if rank == VICTIM or others is None else others))


@pytest.mark.parametrize("scenario", ["late", "stopped"])
def test_a_rank_that_does_not_come_is_named_by_all_others(scenario, tmp_path):
    status, err, errors = run(scenario, 3, tmp_path)
    assert status != 0, err
    assert sorted(errors) == ([0, 1, 2] if scenario == "late" else [0, 2]), f"{errors}\n{err}"
    causes = []
    for rank, message in errors.items():
        assert_named(message, "FlashMoEError", f"rank {rank}", "block", "gave up in epoch", "waited for")
        assert_named(message, f"{layer_worker.DEADLINE_S:g} s", "it holds epoch" if scenario == "late" else "")
        causes.append(f"flag of rank {VICTIM}" in message)
    # A rank that was stopped may hold up others in the middle, so that somebody waits for one who waits for it.
    assert all(causes) if scenario == "late" else any(causes), f"{errors}"


def test_kill_9_ends_every_rank(tmp_path):
    status, err, _ = run("killed", 3, tmp_path)
    assert status != 0, err
    assert len(list(tmp_path.glob("started*"))) == 3, "the ranks were at work"
