"""The layer under mpirun on several hosts, pretended on one machine: bits of one process, and ranks that are lost."""

import re

import layer_worker
import numpy as np
import pytest
from cases import DTYPES, assert_kept_nothing, bits, counts_memory, random_tokens, tiny_config
from hosts_worker import RANKS_PER_HOST, changing_calls, large_config
from layer_worker import make_config, make_weights
from losing import VICTIM, last_words
from nightly import at_night_only
from test_carrier_mpi import TCP
from test_layer_mpi import GUARDED, assert_named, assert_results_of_threads, run
from test_training_mpi import assert_gradients_of_one_rank, one_rank  # noqa: F401 (a fixture)

from flashmoe_numba import FlashMoE
from reference import Weights

pytestmark = pytest.mark.mpi
pytest.importorskip("mpi4py", reason="the extra `mpi` is not installed")

HOSTS = [(4, 2), *at_night_only(((6, 2),), ((8, 4),))]  # (ranks, ranks of a host); (6, 2) by day in tests/hosts
MOMENTS = ["before its blocks", "after its dispatch"]


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """The kernels are in the disk cache, so that no rank compiles while the time of a test runs."""
    for dtype in DTYPES:
        config = tiny_config(dtype=dtype)
        FlashMoE(config, Weights.random(config)).close()


def run_on_hosts(scenario, hosts, folder, *arguments, **variables):
    num_ranks, ranks_per_host = hosts
    variables |= {RANKS_PER_HOST: str(ranks_per_host)}
    return run(scenario, num_ranks, folder, *arguments, worker="hosts_worker.py", **variables)


def saved_by(hosts, folder):
    return [np.load(folder / f"rank{rank}.npz") for rank in range(hosts[0])]


@pytest.mark.parametrize("hosts", HOSTS)
def test_results_are_those_of_threads(hosts, tmp_path):
    status, err, errors = run_on_hosts("results", hosts, tmp_path)
    assert status == 0 and not errors, f"{errors}\n{err}"
    assert_results_of_threads(hosts[0], tmp_path)


def test_gradients_have_the_bits_of_one_rank(one_rank, tmp_path):  # noqa: F811
    status, err, errors = run_on_hosts("gradients", (4, 2), tmp_path)
    assert status == 0 and not errors, f"{errors}\n{err}"
    assert_gradients_of_one_rank(one_rank, 4, tmp_path)


@pytest.mark.parametrize("environment", [{}, TCP], ids=["shared memory", "tcp"])
def test_packets_of_several_megabytes(environment, tmp_path):
    status, err, errors = run_on_hosts("large", (4, 2), tmp_path, **environment)
    assert status == 0 and not errors, f"{errors}\n{err}"
    config = large_config(4)
    with FlashMoE(config, Weights.random(config, seed=4), num_processors=1) as layer:
        expected = np.stack([layer(random_tokens(config, seed=call)) for call in range(3)], axis=1)
    for rank, part in enumerate(saved_by((4, 2), tmp_path)):
        np.testing.assert_array_equal(part["y"], bits(expected[rank]))


WAYS = {"tcp": TCP, "shared memory": {}}  # of messages
CALLS = ["changing", "late_carriers", "paused", "mixed"]
IN_MEMORY = [("shared memory", "changing"), *at_night_only(*(("shared memory", name) for name in CALLS[1:]))]


@pytest.mark.parametrize(("way", "scenario"), [*(("tcp", name) for name in CALLS), *IN_MEMORY])
def test_calls_with_other_numbers_of_tokens(scenario, way, tmp_path):
    """Also if carriers are late, a rank is stopped for a while, or the caller has messages of its own."""
    hosts = (4, 2)
    status, err, errors = run_on_hosts(scenario, hosts, tmp_path, **WAYS[way])
    assert status == 0 and not errors, f"{errors}\n{err}"
    config, saved = make_config(hosts[0]), saved_by(hosts, tmp_path)
    with FlashMoE(config, make_weights(config)) as layer:
        for call, x in enumerate(changing_calls(config)):
            for rank, y in enumerate(layer(x)):
                np.testing.assert_array_equal(saved[rank][str(call)], bits(y), err_msg=f"call {call}, rank {rank}")


@counts_memory
def test_thousands_of_calls_keep_nothing(tmp_path):
    status, err, errors = run_on_hosts("many_calls", (2, 1), tmp_path)
    assert status == 0 and not errors, f"{errors}\n{err}"
    for part in saved_by((2, 1), tmp_path):
        assert_kept_nothing(part["growth"], 1_500)


@pytest.mark.parametrize(
    ("scenario", "own", "others"),
    [
        ("bad_tokens", ["TypeError", "x", "float32", "float64"], ["FlashMoEError", "rank 1 left in epoch"]),
        ("raises_in_the_middle", ["ZeroDivisionError", "planted"], ["FlashMoEError", "rank 1 left in epoch 7"]),
        ("other_calls", ["makes", "the backward of call 1", "a forward"], None),
    ],
)
def test_an_error_on_one_rank_is_raised_on_all(scenario, own, others, tmp_path):
    status, err, errors = run_on_hosts(scenario, (4, 2), tmp_path)
    assert status != 0, err
    assert sorted(errors) == [0, 1, 2, 3], f"{errors}\n{err}"
    for rank, message in errors.items():
        assert_named(message, *(own if rank == VICTIM or others is None else others))


@pytest.mark.parametrize("saved", [None, "4096"])
def test_a_layer_is_refused_where_mpi_does_not_keep_its_messages(saved, tmp_path, monkeypatch):
    monkeypatch.delenv("FI_TCP_MAX_SAVED", raising=False)
    environment = TCP | {"FI_TCP_MAX_SAVED": saved} if saved else {n: TCP[n] for n in TCP if n != "FI_TCP_MAX_SAVED"}
    status, err, errors = run_on_hosts("many_puts", (2, 1), tmp_path, **environment)
    assert (status == 0) == (saved is not None) and sorted(errors) == ([] if saved else [0, 1]), f"{errors}\n{err}"
    for message in errors.values():
        assert_named(message, "ValueError: FI_TCP_MAX_SAVED must be more than", "got none, which is 64")


def test_a_rank_that_comes_too_late_is_named_by_all_others_and_told(tmp_path):
    status, err, errors = run_on_hosts("late", (4, 2), tmp_path)
    assert status != 0, err
    assert sorted(errors) == [0, 1, 2, 3], f"{errors}\n{err}"
    for rank, message in errors.items():
        assert_named(message, "FlashMoEError", f"rank {rank}", "block", "(OS block) gave up in epoch 2: waited for")
        assert_named(message, f"the dispatch flag of rank {VICTIM}", "it holds epoch 1", f"{layer_worker.DEADLINE_S} s")


LOST = [(TCP, "lost", moment, signum) for moment in MOMENTS for signum in ("SIGKILL", "SIGSTOP")]


@pytest.mark.parametrize(
    ("environment", "scenario", "moment", "signum"),
    [*LOST, ({}, "lost", MOMENTS[0], "SIGKILL"), (TCP, "lost_in_a_backward", MOMENTS[1], "SIGKILL")],
)
def test_a_rank_lost_in_a_call_is_named_by_all_others(environment, scenario, moment, signum, tmp_path):
    arguments = scenario, (4, 2), tmp_path, moment, signum
    status, err, errors = run_on_hosts(*arguments, **environment, **{GUARDED: "1"})
    assert status != 0, err
    assert sorted(errors) == [0, 2, 3], f"{errors}\n{err}"
    for rank, message in errors.items():
        expected = "FlashMoEError: " + last_words(moment, rank, layer_worker.DEADLINE_S)
        assert re.fullmatch(expected, message), f"{message!r} is not {expected!r}"
