"""Hosts are asked before anything starts, and what is wrong with one is a sentence that names it."""

import json
import sys
from dataclasses import replace

import pytest

from flashmoe_numba import cli
from flashmoe_numba.commands.network import write_network
from flashmoe_numba.processes import destinations, launch
from flashmoe_numba.processes.destinations import Destinations, describe
from sim import load_hardware
from sim.world.machine_files import to_toml

pytestmark = pytest.mark.usefixtures("outside_mpirun")

# A host's name is a script beside the launcher, which is given the command.
LAUNCHER = """#!/bin/sh
[ "$1" = -x ] && shift
host=$1
shift
[ -x "${0%/*}/$host" ] || { echo "no route to $host" >&2; exit 255; }
exec "${0%/*}/$host" "$*"
"""
TINY = ["run", "--preset", "laptop-tiny", "--ranks", "6", "--experts", "6"]


@pytest.fixture
def launcher(tmp_path):
    """A stand-in for ssh, and a maker of its hosts, which answer by a line of shell."""

    def make(name, line):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)

    make("launcher", LAUNCHER.removeprefix("#!/bin/sh\n"))
    make.path = str(tmp_path / "launcher")
    return make


def answer(machine, **changed):
    return f"echo '{json.dumps(describe() | {'machine': machine} | changed)}'"


@pytest.mark.parametrize(("names", "launcher", "message"), [
    (("a", ""), "ssh", "hosts must be names or addresses with commas between them, got ''"),
    (("a", "-oProxyCommand=x"), "ssh", "hosts must be names or addresses with commas between them, got '-oProxy"),
    (("a", "b:4"), "ssh", "hosts must be names or addresses with commas between them, got 'b:4'"),
    (("a", "B", "b"), "ssh", "each host must be named once, got b 2 times"),
    (("a",), "no-such-thing", "launcher must be one of ssh, rsh, slurm, ll, lsf, sge or a program, got 'no-such-"),
])  # fmt: skip
def test_names_that_cannot_be(names, launcher, message):
    with pytest.raises(ValueError, match="^" + message):
        Destinations(names, launcher)


def test_mpirun_is_told_hosts_counts_and_launcher(launcher):
    assert Destinations(("a", "b"), "slurm").flags(6) == ["-launcher", "slurm", "-hosts", "a,b", "-ppn", "3"]
    by_program = Destinations(("a",), launcher.path).flags(6)
    assert by_program == ["-launcher", "ssh", "-launcher-exec", launcher.path, "-hosts", "a", "-ppn", "6"]


def test_hosts_say_which_machine_they_are(launcher):
    launcher("a", "echo 'Welcome to a!'; " + answer("one"))
    launcher("b", 'eval "$1"')  # runs the question
    assert Destinations(("a", "b"), launcher.path).ask() == {"a": "one", "b": describe()["machine"]}
    assert Destinations(("a", "b"), "slurm").ask() == {}


@pytest.mark.parametrize(("line", "error", "message"), [
    (None, ConnectionError, r"b cannot be reached by \S+/launcher: no route to b"),
    ("exit 127", ConnectionError, "b cannot run .*python.*processes.answer, which must be there as here: status 127"),
    ("echo first >&2; echo last >&2; exit 1", ConnectionError, "b cannot run .*, which must be there as here: last"),
    ("echo hello", ConnectionError, r"b gave no answer that can be read: \['hello'\]"),
    ("true", ConnectionError, r"b gave no answer that can be read: \[\]"),
    (answer("two", package="flashmoe-numba of source 123"), ConnectionError,
     "b must have what is here, flashmoe-numba of source [0-9a-f]{12}, .*numba.*, got flashmoe-numba of source 123"),
    (answer("one"), ValueError, "each host must be named once, but a and b are one machine"),
    ("sleep 9", ConnectionError, "b has not answered within 0.5 s"),
])  # fmt: skip
def test_what_is_wrong_with_a_host_is_said(launcher, monkeypatch, line, error, message):
    monkeypatch.setattr(destinations, "ANSWER_PATIENCE_S", 0.5 if line == "sleep 9" else 30.0)
    launcher("a", answer("one"))
    if line is not None:
        launcher("b", line)
    with pytest.raises(error, match=f"^{message}$"):
        Destinations(("a", "b"), launcher.path).ask()


@pytest.mark.parametrize(("name", "program"), [("ssh", "ssh"), ("rsh", "rsh"), ("slurm", "srun")])
def test_a_launcher_whose_program_is_not_here_is_named(capsys, monkeypatch, tmp_path, name, program):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main([*TINY, "--hosts", "a", "--launcher", name]) == 2
    expected = f"flashmoe run: error: argument --launcher: {name} needs {program}, which is not in PATH here\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(("flags", "message"), [
    (["--hosts", "a,b,c,d"], "argument --ranks: must be a multiple of the 4 hosts, which get as many ranks each; g"),
    (["--hosts", "a,a"], "argument --hosts: each host must be named once, got a 2 times"),
    (["--hosts", "a", "--launcher", "none"], "argument --launcher: launcher must be one of ssh, rsh, slurm, ll, lsf"),
    (["--launcher", "ssh"], "argument --launcher: goes with --hosts, got ssh without"),
    (["--hosts", "a", "--threads"], "argument --threads: not allowed with argument --hosts"),
    (["--hosts", "a", "--backend", "fibers"], "argument --hosts: goes with --backend cpu, got fibers"),
    (["--hosts", "a", "--trace", "t.json"], "argument --trace: goes with ranks of one machine: clocks of several"),
])  # fmt: skip
def test_flags_that_do_not_fit(capsys, monkeypatch, tmp_path, flags, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*TINY, *flags]) == 2
    assert capsys.readouterr().err.startswith(f"flashmoe run: error: {message}")


def test_inside_a_users_mpirun_hosts_are_its_own(capsys, monkeypatch):
    monkeypatch.setenv("PMI_RANK", "0")
    assert cli.main([*TINY, "--hosts", "a"]) == 2
    assert "the hosts are those of this mpirun: start this without --hosts" in capsys.readouterr().err


def test_run_starts_the_ranks_there(launcher, monkeypatch):
    started = []
    monkeypatch.setattr(launch, "find_mpirun", lambda: "/some/mpirun")
    monkeypatch.setattr(launch, "_wait_for_ranks", lambda *arguments: started.append(arguments[-1]))
    popen = launch.subprocess.Popen

    def start(command, **settings):
        started.append((command, settings["env"]))
        return popen(["true"], **settings)

    monkeypatch.setattr(launch.subprocess, "Popen", start)
    monkeypatch.setattr(destinations.Destinations, "ask", lambda self: {"a": describe()["machine"], "b": "another"})
    assert cli.main([*TINY, "--hosts", "a,b", "--launcher", launcher.path]) == 0
    (command, environment), num_here = started
    where = ["-launcher", "ssh", "-launcher-exec", launcher.path, "-hosts", "a,b", "-ppn", "3", "-n", "6"]
    assert command[:10] == ["/some/mpirun", *where][:10] and num_here == 3
    chosen = {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp", "HYDRA_RMK": "user"}
    assert environment.items() >= chosen.items()
    assert environment[launch.COMMAND_VARIABLE].startswith(f"{sys.executable} -Pm flashmoe_numba run --preset")


@pytest.mark.parametrize(("flags", "message"), [
    (["--hosts", "a"], "argument --hosts: needs two hosts or more to measure between them, got a"),
    (["--machine-file", "x.toml"], "argument --machine-file: goes with --hosts, got x.toml without"),
    (["--hosts", "a,b", "--machine-file", "x"], "argument --machine-file: must end in .toml, got 'x'"),
    (["--hosts", "a,b", "--machine-file", "x.toml"], "argument --machine-file: hardware file x.toml: no such file"),
    (["--launcher", "ssh"], "argument --launcher: goes with --hosts, got ssh without"),
])  # fmt: skip
def test_doctor_flags_that_do_not_fit(capsys, monkeypatch, tmp_path, flags, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["doctor", *flags]) == 2
    assert capsys.readouterr().err.startswith(f"flashmoe doctor: error: {message}")


def test_what_was_measured_becomes_the_network_of_a_machine(tmp_path):
    file = tmp_path / "my.toml"
    file.write_text(f"# simulate with --set rate=1.0\n{to_toml(load_hardware('4xH100'))}")
    speeds = [(5000.0, 0.5), (7000.0, 0.7), (6000.0, 0.65)]
    links = [{"source": 0, "target": 1, "latency_ns": latency, "gbps": gbps} for latency, gbps in speeds]
    report = {"hosts": ["a", "b", "c"], "links": links, "netmod": "ofi/tcp", "core_gbps": 0.87654}
    for _ in range(2):  # once more changes nothing
        write_network(str(file), report)
        before, after = load_hardware("4xH100"), load_hardware(str(file))
        assert file.read_text().startswith("# simulate with --set rate=1.0\nschema")
        assert (after.num_nodes, after.gpus_per_node, after.gpus_per_nic) == (3, 4, 4)
        assert (after.nic_latency_ns, after.nic_gbps) == (6000, 0.65)
        assert (after.name, after.chip, after.nvlink_gbps) == ("3 x 4xH100", before.chip, before.nvlink_gbps)
        assert "flashmoe doctor --hosts between 3 hosts, ofi/tcp" in after.sources["nic_gbps"]
        assert after.sources["nvlink_gbps"] == before.sources["nvlink_gbps"]
        assert after.core_gbps is None, "of a GPU no core carries anything"
    cores = replace(before, core_gbps=9.0, sources={**before.sources, "core_gbps": "a test"})
    file.write_text(to_toml(cores))
    write_network(str(file), report)
    after = load_hardware(str(file))
    assert after.core_gbps == 0.8765 and "flashmoe doctor --hosts" in after.sources["core_gbps"]
