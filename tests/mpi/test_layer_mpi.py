"""The layer under mpirun: the bits of the threads' results, and what every rank is told when one goes wrong."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cases import (
    DTYPES,
    assert_equals_oracle,
    assert_kept_nothing,
    assert_same_bits,
    bits,
    counts_memory,
    random_tokens,
    tiny_config,
)
from nightly import at_night_only
from published import make_folder

from flashmoe_numba import FlashMoE
from flashmoe_numba.checkpoints import load
from reference import Routing, Weights

pytestmark = pytest.mark.mpi
pytest.importorskip("mpi4py", reason="the extra `mpi` is not installed")

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.append(str(HERE))
import layer_worker  # noqa: E402
from layer_worker import GUARDED, NUM_CALLS, WARM_UP, make_calls, make_config, make_weights  # noqa: E402
from losing import VICTIM, last_words  # noqa: E402

SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """The kernels are in the disk cache, so that no rank compiles while the time of a test runs."""
    for dtype in DTYPES:
        config = tiny_config(dtype=dtype)
        FlashMoE(config, Weights.random(config)).close()


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
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if str(folder) in (entry / "cmdline").read_text():
                processes.append(entry.name)
            memory -= set(re.findall(rf"{SHARED_MEMORY}/(\S+)", (entry / "maps").read_text()))  # in use, if by others
    return sorted(memory) + processes


def run(scenario, num_ranks, folder, *arguments, timeout_s=100, worker="layer_worker.py", **variables):
    """(exit status, stderr, {rank: its error}) of one mpirun; nothing is left behind."""
    before = set(os.listdir(SHARED_MEMORY)) if SHARED_MEMORY.is_dir() else set()
    command = [mpirun(), "-n", str(num_ranks), sys.executable, "-m", "mpi4py", str(HERE / worker)]
    command += [scenario, str(folder), *arguments]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]), **variables)
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s, env=environment, stdin=subprocess.DEVNULL
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


@pytest.mark.parametrize("num_ranks", [2, *at_night_only(4), 8])
def test_results_are_those_of_threads(num_ranks, tmp_path):
    status, err, errors = run("results", num_ranks, tmp_path)
    assert status == 0 and not errors, f"{errors}\n{err}"
    assert_results_of_threads(num_ranks, tmp_path)


def assert_results_of_threads(num_ranks, folder):
    """What ranks have saved of "results"."""
    saved = [np.load(folder / f"rank{rank}.npz") for rank in range(num_ranks)]
    for dtype in DTYPES:
        config = make_config(num_ranks, dtype=dtype)
        weights = make_weights(config)
        with FlashMoE(config, weights, num_processors=2) as layer:
            for call, (x, routing) in enumerate(make_calls(config)):
                y = layer(x, **routing)
                for rank, (part, chosen, stats) in enumerate(zip(y, layer.routing, layer.stats, strict=True)):
                    key, case = f"{dtype}_{call}", f"{config}, call {call}, rank {rank} of {num_ranks}"
                    np.testing.assert_array_equal(saved[rank][key], bits(part), err_msg=case)
                    np.testing.assert_array_equal(saved[rank][f"{key}_idx"], chosen.topk_idx, err_msg=case)
                    assert_same_bits(saved[rank][f"{key}_weights"], chosen.topk_weights, case)
                    expected = [stats.epoch, stats.sent_rows, stats.received_rows]
                    assert saved[rank][f"{key}_stats"].tolist() == expected, case
                y = [part[key].view(config.numpy_dtype) for part in saved]
                routings = [Routing(part[f"{key}_idx"], part[f"{key}_weights"]) for part in saved]
                assert_equals_oracle(y, x, weights, config, routings, external=bool(routing))


def test_one_rank_compiles_and_the_others_load(tmp_path):
    status, err, errors = run("how_compiled", 4, tmp_path, timeout_s=400, FLASHMOE_CACHE_DIR=str(tmp_path / "cache"))
    assert status == 0 and not errors, f"{errors}\n{err}"
    saved = [np.load(tmp_path / f"rank{rank}.npz") for rank in range(4)]
    came = sorted((int(part["compiled"]), int(part["found"])) for part in saved)
    assert came == [(0, 1), (0, 1), (0, 1), (1, 0)], "(compiled, found) of the ranks"
    config = make_config(4)
    with FlashMoE(config, make_weights(config)) as layer:
        assert_same_bits([part["y"] for part in saved], layer(random_tokens(config)))


@counts_memory
def test_thousands_of_calls_keep_nothing(tmp_path):
    status, err, errors = run("many_calls", 2, tmp_path)
    assert status == 0 and not errors, f"{errors}\n{err}"
    for rank in range(2):
        assert_kept_nothing(np.load(tmp_path / f"rank{rank}.npz")["growth"], NUM_CALLS - WARM_UP)


@pytest.mark.parametrize(
    ("scenario", "own", "others"),
    [
        ("different_config", ["ValueError", "rank 0", "tile_n=4", "rank 1", "tile_n=8"], None),
        ("different_arithmetic", ["ValueError", "rank 0", "arithmetic='fma'", "rank 1", "arithmetic='pairs'"], None),
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


def test_a_rank_that_comes_too_late_is_named_by_all_others_and_told(tmp_path):
    status, err, errors = run("late", 3, tmp_path)
    assert status != 0, err
    assert sorted(errors) == [0, 1, 2], f"{errors}\n{err}"
    for rank, message in errors.items():
        assert_named(message, "FlashMoEError", f"rank {rank}", "block", "(OS block) gave up in epoch 2: waited for")
        assert_named(message, f"the dispatch flag of rank {VICTIM}", "it holds epoch 1", f"{layer_worker.DEADLINE_S} s")


@pytest.mark.parametrize("signum", ["SIGKILL", "SIGSTOP"])
@pytest.mark.parametrize("moment", ["before its blocks", "after its dispatch"])
def test_a_rank_lost_in_a_call_is_named_by_all_others(moment, signum, tmp_path):
    status, err, errors = run("lost", 3, tmp_path, moment, signum, **{GUARDED: "1"})
    assert status != 0, err
    assert sorted(errors) == [0, 2], f"{errors}\n{err}"
    for rank, message in errors.items():
        expected = "FlashMoEError: " + last_words(moment, rank, layer_worker.DEADLINE_S)
        assert re.fullmatch(expected, message), f"{message!r} is not {expected!r}"


@pytest.mark.parametrize("moment", ["before its blocks", "after its dispatch"])
def test_kill_9_in_a_call_ends_every_rank(moment, tmp_path):
    status, err, errors = run("lost", 3, tmp_path, moment, "SIGKILL")
    assert status != 0 and not errors, f"{errors}\n{err}"
    assert (tmp_path / "victim").exists(), f"it ended before the call\n{err}"


def test_ranks_that_each_read_their_own_experts_of_a_checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    make_folder(folder, "mixtral")
    status, err, errors = run("checkpoint", 4, tmp_path)
    assert status == 0 and not errors, f"{errors}\n{err}"
    saved = [np.load(tmp_path / f"rank{rank}.npz") for rank in range(4)]
    config, weights = load(folder, 3, num_tokens=28)
    x = np.concatenate(random_tokens(replace(config, num_ranks=4, num_tokens=7)))
    with FlashMoE(config, weights, num_processors=2) as layer:
        y = layer(x[None])[0]
    assert_same_bits(np.concatenate([part["y"] for part in saved]), y, "4 ranks and 1")
    experts = weights.num_bytes - weights.router.nbytes
    assert [part["bytes_read"] for part in saved] == [experts // 4 + weights.router.nbytes] * 4
