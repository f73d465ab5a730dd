"""Layers on hosts of their own: bits of one process, whatever the network does, and errors that name who was lost.

Nightly (the Hypothesis profile) on more hosts and ranks, and with every fault several times.
"""

import json
import os
import sys
import time

import numpy as np
import pytest
from cases import DTYPES, bits, random_tokens, tiny_config
from nightly import IS_NIGHT, at_night_only
from running_on_hosts import ROOT, require_hosts

from flashmoe_numba import FlashMoE
from flashmoe_numba.processes.launch import TERMINAL_VARIABLE, find_mpirun
from reference import Weights

pytestmark = pytest.mark.mpi
pytest.importorskip("mpi4py", reason="the extra `mpi` is not installed")

sys.path.append(str(ROOT / "tests/mpi"))
from hosts import trial  # noqa: E402
from hosts.faults import FAULTS  # noqa: E402
from hosts_worker import changing_calls, large_config  # noqa: E402
from layer_worker import make_config, make_weights  # noqa: E402
from test_layer_mpi import assert_results_of_threads  # noqa: E402
from test_training_mpi import assert_gradients_of_one_rank, one_rank  # noqa: E402, F401 (a fixture)

SIZES = [(2, 2), (3, 2), *at_night_only((2, 4))]  # (hosts, ranks of each)
FAULT_RUNS = 5 if IS_NIGHT else 1
SLOW_MBIT = 30


def compile_for(*dtypes):
    """The kernels are in the disk cache, so that no rank compiles while the time of a test runs."""
    for dtype in dtypes:
        config = tiny_config(dtype=dtype)
        FlashMoE(config, Weights.random(config)).close()


@pytest.fixture(scope="module", autouse=True)
def compiled():
    require_hosts(bool(os.environ.get("CI")))
    compile_for("float32")


@pytest.fixture
def run(hosts_of, tmp_path):
    """A scenario's results by rank; no rank raises, and mpirun, on one host more, says nothing."""

    def run_scenario(scenario, num_hosts, ranks_per_host, mbit=None):
        hosts, num_ranks = hosts_of(1 + num_hosts), num_hosts * ranks_per_host
        if mbit is not None:
            hosts.hosts.limit(mbit)
        where = hosts.hosts.where(num_ranks, range(1, 1 + num_hosts))
        worker = [sys.executable, "-m", "mpi4py", ROOT / "tests/hosts/layers_worker.py", scenario, tmp_path]
        done = hosts.run([find_mpirun(), *where, *worker], timeout_s=250)
        errors = {file.stem: file.read_text() for file in tmp_path.glob("rank*.txt")}
        assert (done.returncode, errors) == (0, {}), done.stderr
        assert [host for host in range(1 + num_hosts) if hosts.hosts.processes(host)] == []
        return [np.load(tmp_path / f"rank{rank}.npz") for rank in range(num_ranks)]

    return run_scenario


@pytest.mark.parametrize("size", SIZES)
def test_results_are_those_of_threads_in_all_types(run, size, tmp_path):
    compile_for(*DTYPES)
    run("results", *size)
    assert_results_of_threads(size[0] * size[1], tmp_path)


@pytest.mark.parametrize("size", SIZES)
def test_gradients_have_the_bits_of_one_rank(run, size, one_rank, tmp_path):  # noqa: F811
    run("gradients", *size)
    assert_gradients_of_one_rank(one_rank, size[0] * size[1], tmp_path)


@pytest.mark.parametrize(
    ("scenario", "mbit"),
    [("changing", None), ("changing", SLOW_MBIT), ("mixed", None), ("mixed", SLOW_MBIT), ("late_carriers", None)],
)
def test_calls_with_other_numbers_of_tokens(run, scenario, mbit):
    """Also beside another layer and messages of the caller's own (mixed), and where puts pile up (late carriers)."""
    saved = run(scenario, 2, 2, mbit)
    config = make_config(4)
    with FlashMoE(config, make_weights(config)) as layer:
        for call, x in enumerate(changing_calls(config)):
            for rank, y in enumerate(layer(x)):
                np.testing.assert_array_equal(saved[rank][str(call)], bits(y), err_msg=f"call {call}, rank {rank}")


def test_packets_of_several_megabytes(run):
    saved = run("large", 2, 2)
    config = large_config(4)
    with FlashMoE(config, Weights.random(config, seed=4), num_processors=1) as layer:
        expected = np.stack([layer(random_tokens(config, seed=call)) for call in range(3)], axis=1)
    for rank, part in enumerate(saved):
        np.testing.assert_array_equal(part["y"], bits(expected[rank]))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("seed", range(FAULT_RUNS))
def test_what_is_lost_is_named_by_all_others_and_what_is_not_does_no_harm(fault, seed):
    size = trial.Size()
    verdict = trial.one_trial(fault, size, np.random.default_rng([seed, *fault.encode()]))
    assert verdict.problems == []
    assert verdict.calls > trial.BEGIN_CALLS
    lasting = {"pause": 0, "blink": 0, "slow": 0, "cut": 4, "rank-kill": 3, "rank-stop": 3}.get(fault, 2)
    assert verdict.named + len(verdict.other) + verdict.ended == lasting
    assert verdict.right == (0 if lasting else size.num_ranks)
    assert fault == "host-dies" or verdict.ended == 0


@pytest.mark.parametrize("flags", [[], ["--backward"]])
def test_flashmoe_run_passes_on_hosts(hosts_of, tmp_path, flags):
    hosts = hosts_of(3)
    report = tmp_path / "run.json"
    sizes = ["--preset", "laptop-tiny", "--ranks", "4", "--experts", "8", "--iterations", "2", "--json", str(report)]
    done = hosts.flashmoe("run", *sizes, "--hosts", "host-2,host-3", *flags)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(report.read_text())
    assert (found["passed"], found["bitwise_repeatable"], found["hosts"]) == (True, True, 2)
    assert (found["netmod"], found["transport"]) == ("ofi/tcp", "mpi")
    assert "4 as processes under mpirun on 2 hosts (ofi/tcp)" in done.stdout
    assert [host for host in range(3) if hosts.hosts.processes(host)] == []


def test_flashmoe_run_warns_of_another_netmod(hosts_of):
    hosts = hosts_of(2)
    hosts.environment["MPIR_CVAR_CH4_NETMOD"] = "ucx"
    done = hosts.flashmoe(
        "run", "--preset", "laptop-tiny", "--ranks", "2", "--hosts", "host-1,host-2", "--experts", "4"
    )
    assert done.returncode == 0, done.stderr
    warned = "flashmoe run: warning: MPI uses ucx between hosts: a lost rank may end all others without a word; set "
    assert done.stderr.startswith(warned) and done.stderr.count("\n") == 1


def test_flashmoe_run_says_which_ranks_are_gone_without_power(hosts_of, tmp_path):
    hosts, stderr = hosts_of(3), tmp_path / "stderr"
    hosts.environment[TERMINAL_VARIABLE] = "1"  # so that it shows how far it is
    endless = ["--preset", "laptop-tiny", "--ranks", "4", "--experts", "8", "--iterations", "1000000"]
    command = [sys.executable, "-m", "flashmoe_numba", "run", *endless, "--deadline-s", "2", "--hosts", "host-2,host-3"]
    with stderr.open("w") as file:
        process = hosts.start([*command, "--launcher", hosts.hosts.launcher], stderr=file)
    limit = time.monotonic() + 100
    while "layer and BLAS" not in stderr.read_text():
        assert process.poll() is None and time.monotonic() < limit, stderr.read_text()
        time.sleep(0.05)
    hosts.hosts.power_off(2)
    assert process.wait(60) == 1
    said = [line for line in stderr.read_text().splitlines() if "flashmoe: error: rank " in line]
    # Between calls, where ranks meet, the first of them to give up ends all, maybe before the other has said so.
    assert said and {line.split("flashmoe: error: rank ")[1][0] for line in said} <= {"0", "1"}, said
    assert any("rank 2" in line or "rank 3" in line for line in said), said
