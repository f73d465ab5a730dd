"""`flashmoe run` and `flashmoe plan` in this process: errors, reports, files, and that a wrong layer is not passed."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
from children import printed

from flashmoe_numba import FlashMoE, FlashMoEError, cli
from flashmoe_numba.processes import launch, mpi_environment
from reference import ACTIVATIONS, Hosts, Layout, Weights, load_preset, make_plan, make_workload

TINY = ["run", "--preset", "laptop-tiny", "--threads", "--iterations", "2"]
ISSUE_KEYS = {
    *("backend", "ranks", "config", "workload", "iterations", "latency_ms", "tokens_per_s", "gflops", "blas_gflops"),
    *("blas_share", "max_rel_error", "tolerance", "bitwise_repeatable", "sent_rows", "padded_row_share"),
    *("dropped_pairs", "passed"),
}


pytestmark = pytest.mark.usefixtures("outside_mpirun")


def run_json(capsys, *flags):
    """(exit status, report) of a run whose stdout must be JSON alone."""
    code = cli.main([*TINY, "--json", "-", *flags])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("flags", "message"), [
    (["--ranks", "3"], "--experts must be a multiple of --ranks=3, got 32"),
    (["--ranks", "0"], "argument --ranks: must be an integer >= 1, got '0'"),
    (["--tokens", "-4"], "argument --tokens: must be an integer >= 1, got '-4'"),
    (["--hidden", "1e3"], "argument --hidden: must be an integer >= 1, got '1e3'"),
    (["--ffn", "2147483648"], "--ffn must be in [1, 2**31 - 1], got 2147483648"),
    (["--topk", "33"], "--topk must be in [1, --experts=32], got 33"),
    (["--capacity", "0"], "argument --capacity: must be an integer >= 1, got '0'"),
    (["--capacity", "513"], "--capacity must be in [1, --tokens=512] or None, got 513"),
    (["--activation", "tanh"], f"--activation must be one of {', '.join(ACTIVATIONS)}; got 'tanh'"),
    (["--dtype", "int8"], "--dtype must be one of float32, float64, float16, bfloat16; got 'int8'"),
    (["--preset", "gpt-5"], "--preset must be one of"),
    (["--workload", "zipf:-1"], "argument --workload: name must be one of: text"),
    (["--workload", "no.npz"], "argument --workload: name is a recorded workload, but there is no file no.npz"),
    (["--processors", "0"], "argument --processors: must be an integer >= 1, got '0'"),
    (["--processors", "513", "--threads"], "argument --processors: must be in [1, 512], got 513"),
    (["--iterations", "0"], "argument --iterations: must be an integer >= 1, got '0'"),
    (["--seed", "-1"], "argument --seed: must be an integer >= 0, got '-1'"),
    (["--deadline-s", "nan"], "argument --deadline-s: must be a number in (0, 86400], got 'nan'"),
    (["--arithmetic", "pairs"], "argument --arithmetic: arithmetic 'pairs' multiplies bfloat16 only"),
    (["--arithmetic", "fma", "--backend", "fibers"], "argument --arithmetic: goes with --backend cpu, got fibers"),
    (["--arithmetic", "vdpbf16ps"], "argument --arithmetic: invalid choice: 'vdpbf16ps'"),
    (["--backend", "gpu"], "argument --backend: invalid choice: 'gpu'"),
    (["--backend", "fibers", "--mpi"], "argument --mpi: fibers run all ranks in one process"),
    (["--threads", "--mpi"], "argument --mpi: not allowed with argument --threads"),
    (["--json", "/proc/none/x.json"], "argument --json: cannot write '/proc/none/x.json'"),
    (["--trace", "/"], "argument --trace: cannot write '/'"),
    (["--tokens"], "argument --tokens: expected one argument"),
    (["--token", "4", "--nonsense"], "unrecognized arguments: "),
])  # fmt: skip
def test_bad_flags_are_one_line_and_start_nothing(capsys, monkeypatch, flags, message):
    monkeypatch.setattr(launch, "start", lambda *_: pytest.fail("mpirun was started"))
    assert cli.main(["run", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"flashmoe run: error: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("argv", [[], ["walk"]])
def test_an_unknown_command_lists_those_there_are(capsys, argv):
    assert cli.main(argv) == 2
    assert capsys.readouterr().err.startswith("flashmoe: error: ")


def test_ranks_other_than_the_first_are_silent_about_bad_flags(capsys, monkeypatch):
    monkeypatch.setenv("PMI_RANK", "3")
    monkeypatch.setenv("PMI_FD", "4")
    assert cli.main(["run", "--tokens", "0"]) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("name", "value"), [("PMI_RANK", "3"), ("PMIX_RANK", "1"), ("PMI_RANK", "")])
def test_who_only_seems_to_be_another_rank_is_not_silent(capsys, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert cli.main(["plan", "--tokens", "0"]) == 2
    assert capsys.readouterr().err.startswith("flashmoe plan: error: argument --tokens: ")
    assert cli.main(["explore", "--world", "alone", "--strategy", "exhaustive", "--seeds", "1", "--no-ties"]) == 0
    assert "1 runs in" in capsys.readouterr().out


def test_without_mpirun_the_error_names_the_cure(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(launch.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(mpi_environment.sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["run", "--preset", "laptop-tiny"]) == 2
    assert "mpirun, not found here: pip install 'flashmoe-numba[mpi]', or run all" in capsys.readouterr().err


def test_too_little_shared_memory_is_said_before_mpirun_starts(capsys, monkeypatch):
    monkeypatch.setattr(launch, "start", lambda *_: pytest.fail("mpirun was started"))
    assert cli.main(["run", "--ranks", "8", "--tokens", "20000000"]) == 2
    assert re.match(r"flashmoe run: error: the ranks need \d+ MiB of /dev/shm, which has", capsys.readouterr().err)


def test_json_has_the_keys_and_its_numbers_agree(capsys):
    code, report = run_json(capsys, "--workload", "uniform", "--capacity", "3", "--seed", "5")
    config = load_preset("laptop-tiny", capacity=3)
    assert code == 0
    assert report["passed"] is True
    assert report.keys() >= ISSUE_KEYS
    assert report["config"] == asdict(config)
    assert (report["backend"], report["ranks"], report["workload"], report["iterations"]) == ("cpu", 4, "uniform", 2)
    assert 0 < report["max_rel_error"] <= report["tolerance"]
    assert report["dropped_pairs"] > 0
    assert report["sent_rows"] + report["dropped_pairs"] == 4 * 12 * 2
    latency_s = report["latency_ms"]["median"] / 1e3
    assert report["gflops"] == pytest.approx(report["sent_rows"] * 2 * 16 * 24 * 3 / latency_s / 1e9)
    assert report["tokens_per_s"] == pytest.approx(4 * 12 / latency_s)
    assert report["blas_share"] == pytest.approx(report["gflops"] / report["blas_gflops"])
    assert report["latency_ms"]["min"] <= report["latency_ms"]["median"] <= report["latency_ms"]["max"]
    assert report["bitwise_repeatable"] is True


@pytest.mark.parametrize("flags", [
    ["--workload", "hot", "--no-gated", "--activation", "relu"],
    ["--dtype", "bfloat16", "--processors", "3"],
    ["--dtype", "bfloat16", "--arithmetic", "tiles"],
    ["--backend", "fibers", "--tokens", "5", "--dtype", "float64"],
    ["--ranks", "1", "--topk", "8"],
])  # fmt: skip
def test_other_layers_pass(capsys, flags):
    code, report = run_json(capsys, *flags)
    assert (code, report["failures"]) == (0, [])


def test_the_table_has_units_and_the_verdict(capsys):
    assert cli.main(TINY) == 0
    out, err = capsys.readouterr()
    for text in ("12 tokens per rank", "96 rows sent", " ms, median of 2", "tokens/s", "GFLOP/s", "passed"):
        assert text in out
    assert "not finite" not in out
    assert err == "", "progress is drawn though stderr is no terminal"


def test_a_recording_with_its_routing_is_used_as_it_is(capsys, tmp_path):
    config = load_preset("laptop-tiny")
    made = make_workload("hot", config, 7)
    routing = {name: np.concatenate(getattr(made, name)) for name in ("topk_idx", "topk_weights")}
    np.savez(tmp_path / "recorded.npz", x=np.concatenate(made.x)[:26], **{n: r[:26] for n, r in routing.items()})
    code, report = run_json(capsys, "--workload", str(tmp_path / "recorded.npz"))
    assert (code, report["sent_rows"]) == (0, 26 * 2)


def test_a_recording_with_no_choices_and_a_row_that_overflows(capsys, tmp_path):
    """Gate times up is beyond float32, for the oracle, too."""
    x = np.concatenate(make_workload("uniform", load_preset("laptop-tiny"), 2).x)
    idx, weights = np.tile([3, 1], (8, 1)), np.full((8, 2), 0.5)
    idx[:3], weights[:3] = [[-1, 2], [8, 8], [5, -1]], [[np.nan, 1], [7, 7], [1, np.inf]]
    x[4] *= 1e30
    np.savez(tmp_path / "recorded.npz", x=x, topk_idx=idx, topk_weights=weights)
    assert cli.main([*TINY, "--workload", str(tmp_path / "recorded.npz")]) == 0
    out = capsys.readouterr().out
    for text in ("12 rows sent, 0 pairs dropped", "0 tokens' weights, results of 2 rows", "passed"):
        assert text in out


def spoil(monkeypatch, change):
    """Have the layer return `change(y, call number)`."""
    call, calls = FlashMoE.__call__, []

    def spoiled(self, x, **routing):
        calls.append(None)
        return change(call(self, x, **routing), len(calls))

    monkeypatch.setattr(FlashMoE, "__call__", spoiled)


def wrong_in_one_element(y, _):
    y[2][11, 15] += 1e-4
    return y


def wrong_in_one_bit_of_the_last_call(y, number):
    if number == 3:
        y[3][0, 0] = np.nextafter(y[3][0, 0], np.float32(9))
    return y


def not_finite(y, _):
    y[0][0, 0] = np.nan
    return y


@pytest.mark.parametrize(("change", "failure"), [
    (wrong_in_one_element, "max_rel_error must be at most"),
    (wrong_in_one_bit_of_the_last_call, "the calls gave different bits"),
    (not_finite, "max_rel_error must be at most"),
])  # fmt: skip
def test_a_wrong_result_does_not_pass(capsys, monkeypatch, change, failure):
    spoil(monkeypatch, change)
    code, report = run_json(capsys)
    assert (code, report["passed"]) == (1, False)
    assert failure in report["failures"][0]


@pytest.mark.parametrize("workload", ["text", "hot"])
def test_a_wrong_routing_does_not_pass(capsys, monkeypatch, workload):
    honest = FlashMoE.routing.fget

    def swapped(self):
        routing = honest(self)
        routing[1].topk_weights[4] = routing[1].topk_weights[4][::-1]
        return routing

    monkeypatch.setattr(FlashMoE, "routing", property(swapped))
    code, report = run_json(capsys, "--workload", workload)
    assert code == 1
    assert report["failures"][0].startswith("routing of rank 1: ")


def test_a_lost_call_is_an_error_without_a_traceback(capsys, monkeypatch):
    def give_up(y, number):
        raise FlashMoEError("rank 1, block 1 (OS block) gave up in epoch 1")

    spoil(monkeypatch, give_up)
    assert cli.main(TINY) == 1
    assert capsys.readouterr().err == "flashmoe run: error: rank 1, block 1 (OS block) gave up in epoch 1\n"


@pytest.mark.parametrize(("flags", "message"), [
    (["--trace", "-"], "argument --trace: must be a file, got '-'"),
    (["--json", "a", "--plot", "a"], "argument --json: must not be the file of --plot, got 'a'"),
    (["--json", "./a", "--plot", "a"], "argument --json: must not be the file of --plot, got './a'"),
    (["--threads", "--hidden", "2000000000"], "GiB, and this machine has"),
])  # fmt: skip
def test_outputs_and_sizes_that_cannot_be(capsys, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*TINY, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_too_little_memory_is_no_traceback(capsys, monkeypatch):
    def grow(*_):
        raise MemoryError("Unable to allocate 23.6 GiB")

    monkeypatch.setattr(cli, "_run", grow)
    assert cli.main(["sim"]) == 1
    assert capsys.readouterr().err == "flashmoe sim: error: out of memory: Unable to allocate 23.6 GiB\n"


def test_a_full_disk_and_a_closed_pipe_are_no_tracebacks():
    command = [sys.executable, "-m", "flashmoe_numba", "plan", "--preset", "laptop-tiny", "--json"]
    full = subprocess.run([*command, "/dev/full"], capture_output=True, text=True)
    assert full.returncode == 1 and full.stderr == "flashmoe plan: error: [Errno 28] No space left on device\n"
    read, write = os.pipe()
    os.close(read)
    closed = subprocess.run([*command, "-"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert closed.returncode == 1 and closed.stderr == ""


def test_a_stdout_that_is_closed_is_no_traceback():
    command = f"{sys.executable} -m flashmoe_numba plan --preset laptop-tiny >&-"
    closed = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True)
    assert (closed.returncode, closed.stderr) == (0, "")


def test_files_are_written_into_new_folders(capsys, tmp_path):
    files = {flag: tmp_path / "new" / flag for flag in ("json", "trace", "plot")}
    assert cli.main([*TINY, *(str(part) for flag, file in files.items() for part in (f"--{flag}", file))]) == 0
    assert json.loads(files["json"].read_text())["passed"] is True
    events = json.loads(files["trace"].read_text())["traceEvents"]
    slices = Counter(event["name"] for event in events if event["ph"] == "X")
    assert slices["GATE"] == slices["COMBINE"] == 4 * 3  # 12 tokens of each rank in blocks of 5
    assert slices["DISPATCH"] == slices["RECEIVE"] == 4 * 8
    assert files["plot"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("flags", "config"), [
    (["--preset", "mixtral-8x7b", "--ranks", "4"], load_preset("mixtral-8x7b", num_ranks=4)),
    (["--capacity", "64", "--tokens", "80"], load_preset("laptop-text", capacity=64, num_tokens=80)),
    (["--capacity-factor", "2", "--tokens", "80"], load_preset("laptop-text", capacity=12, num_tokens=80)),
    (["--capacity", "none", "--preset", "flashmoe-paper"], load_preset("flashmoe-paper", capacity=None)),
])  # fmt: skip
def test_plan_is_that_of_the_reference(capsys, flags, config):
    assert cli.main(["plan", "--json", "-", *flags]) == 0
    plan = json.loads(capsys.readouterr().out)
    del plan["preset"]
    assert plan.pop("config") == asdict(config)
    assert plan == asdict(make_plan(config))


def test_a_plan_of_the_largest_sizes_is_counted_in_whole_numbers(capsys):
    flags = ["--ranks", "2", "--experts", "2", "--topk", "1"]
    flags += [word for size in ("hidden", "ffn", "tokens") for word in (f"--{size}", "2147483647")]
    assert cli.main(["plan", "--json", "-", *flags]) == 0
    plan = json.loads(capsys.readouterr().out)
    most = 2**31 - 1
    assert plan["total_flops"] == 2 * most * (2 * 3 * most * most + 2 * most * 2)
    assert plan["busiest_rank_flops"] >= plan["total_flops"] // 2


def test_a_plan_that_would_not_end_is_refused(capsys):
    assert cli.main(["plan", "--ranks", "65536", "--experts", "65536"]) == 2
    assert "must be at most 16,777,216, got 65,536 x 65,536" in capsys.readouterr().err


def test_plan_as_a_table(capsys):
    assert cli.main(["plan", "--preset", "laptop-tiny"]) == 0
    out = capsys.readouterr().out
    weights = Weights.random(load_preset("laptop-tiny"), experts=range(2))
    assert f"weights                   {weights.num_bytes / 1024:.4g} KiB" in out
    assert "tasks: GEMM0" in out


def test_importing_the_command_line_is_cheap():
    costly = ["numpy", "numba", "mpi4py", "matplotlib", "greenlet", "tqdm", "threadpoolctl"]
    program = "import sys, flashmoe_numba.cli; print(*sorted(set(sys.modules) & set(sys.argv[1:])))"
    assert printed("-c", program, *costly).strip() == ""


def test_plan_of_ranks_on_several_hosts(capsys):
    flags = ["--preset", "laptop-tiny", "--ranks", "4", "--save", "nothing"]
    assert cli.main(["plan", *flags, "--ranks-per-host", "2"]) == 0
    text = capsys.readouterr().out
    plan = make_plan(load_preset("laptop-tiny", num_ranks=4), save="nothing", hosts=Hosts.even(4, 2))
    assert f"{plan.max_puts:,} in a call at most" in text and plan.max_puts > 0 and "segment: stage" in text
    assert cli.main(["plan", *flags, "--ranks-per-host", "4"]) == 0
    assert "puts" not in (one := capsys.readouterr().out) and "stage" not in one
    assert cli.main(["plan", *flags, "--ranks-per-host", "0"]) == 2
    assert "argument --ranks-per-host: " in capsys.readouterr().err
    assert cli.main(["plan", *flags, "--ranks-per-host", "5"]) == 2
    expected = "flashmoe plan: error: argument --ranks-per-host: must be at most --ranks=4, got 5\n"
    assert capsys.readouterr().err == expected


def test_plan_counts_all_ranks(capsys):
    config = load_preset("mixtral-8x7b", num_ranks=4, num_tokens=7)
    assert cli.main(["plan", "--preset", "mixtral-8x7b", "--ranks", "4", "--tokens", "7"]) == 0
    rows = dict(re.findall(r"^  (\S.*?)  +(\S+ \S+?)(?:,.*|:.*| at most.*)?$", capsys.readouterr().out, re.MULTILINE))
    plan, segment = make_plan(config), Layout(config).num_bytes
    total = 4 * (segment + plan.weight_bytes + plan.hidden_bytes)
    assert plan.total_bytes == total
    assert rows["bytes"] == f"{total / 2**30:,.2f} GiB"
    assert rows["bytes, weights twice"] == f"{(total + 4 * plan.weight_bytes) / 2**30:,.2f} GiB"
    assert rows["/dev/shm with mpirun"] == f"{4 * (segment + launch.STARTUP_BYTES) / 2**20:.4g} MiB"


def test_segments_that_no_machine_has_name_argument_and_cure(capsys, monkeypatch):
    def refuse(*_):
        raise MemoryError("Unable to allocate")

    monkeypatch.setattr("flashmoe_numba.heap.threads._aligned_zeros", refuse)
    assert cli.main(TINY) == 1
    error = capsys.readouterr().err
    assert re.match(r"flashmoe run: error: out of memory: the segments of 4 ranks need 0\.0 GiB each, more than", error)
    assert "config.num_tokens or a config.capacity" in error and error.count("\n") == 1
