"""Hosts are asked before anything starts, and what is wrong with one is a sentence that names it."""

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from flashmoe_numba import cli
from flashmoe_numba.commands.doctor import hosts as doctor_hosts
from flashmoe_numba.commands.network import write_network
from flashmoe_numba.processes import asking, launch
from flashmoe_numba.processes.description import describe, source_of
from flashmoe_numba.processes.destinations import Destinations
from flashmoe_numba.processes.reaching import Listener
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


PLACE = {"addresses": [], "port": 0, "key": ""}  # is not judged


def answer(machine, misses=(), **changed):
    """A line of shell that says what a host is, and then which others it does not reach."""
    said = describe() | {"machine": machine, "place": PLACE} | changed
    return f"echo '{json.dumps(said)}'; read others && echo '{json.dumps(misses)}'"


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


@pytest.mark.parametrize(("name", "variables", "found"), [
    ("slurm", {}, "bin/srun"),
    ("ll", {}, "bin/poe"),
    ("lsf", {}, "bin/blaunch"),
    ("lsf", {"LSF_BINDIR": "{}/lsf"}, "lsf/blaunch"),
    ("sge", {"SGE_ROOT": "{}/sge"}, "bin/qrsh"),
    ("sge", {"SGE_ROOT": "{}/sge", "ARC": "x86"}, "sge/bin/x86/qrsh"),
])  # fmt: skip
def test_mpirun_is_told_the_program_of_a_launcher(monkeypatch, tmp_path, name, variables, found):
    for path in ("bin/srun", "bin/poe", "bin/blaunch", "bin/qrsh", "lsf/blaunch", "sge/bin/x86/qrsh"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value.format(tmp_path))
    flags = ["-launcher", name, "-launcher-exec", str(tmp_path / found), "-hosts", "a,b", "-ppn", "3"]
    assert Destinations(("a", "b"), name).flags(6) == flags


def test_mpirun_is_told_hosts_counts_and_launcher(launcher):
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
    pytest.param("sleep 1000 > /dev/null & echo last >&2; exit 1", ConnectionError,
     "b cannot run .*, which must be there as here: last", marks=pytest.mark.timeout(120)),
    ("echo hello", ConnectionError, r"b, asked by \S+/launcher, gave no answer that can be read: \['hello'\]"),
    ("true", ConnectionError, r"b, asked by \S+/launcher, gave no answer that can be read: \[\]"),
    (answer("two", package="flashmoe-numba of source 123"), ConnectionError,
     "b must have what is here, flashmoe-numba of source [0-9a-f]{12}, .*numba.*, got flashmoe-numba of source 123"),
    (answer("one"), ValueError, "each host must be named once, but a and b are one machine"),
    ("sleep 9", ConnectionError, "b has not answered within 0.5 s"),
])  # fmt: skip
def test_what_is_wrong_with_a_host_is_said(launcher, monkeypatch, line, error, message):
    monkeypatch.setattr(asking, "PATIENCE_S", 0.5 if line == "sleep 9" else 30.0)
    launcher("a", answer("one"))
    if line is not None:
        launcher("b", line)
    with pytest.raises(error, match=f"^{message}$"):
        Destinations(("a", "b"), launcher.path).ask()


def test_a_host_that_does_not_reach_another_is_named(launcher, monkeypatch):
    launcher("a", answer("one"))
    launcher("b", answer("two", misses=["c"]))
    launcher("c", answer("three", place=PLACE | {"addresses": ["10.9.8.7", "10.9.8.8"]}))
    message = "^b does not reach c at 10.9.8.7, 10.9.8.8: MPI and mpirun need all TCP ports between all of them$"
    with pytest.raises(ConnectionError, match=message):
        Destinations(("a", "b", "c"), launcher.path).ask()
    monkeypatch.setenv("FI_TCP_PORT_LOW_RANGE", "4000")  # somebody chose ports
    assert Destinations(("a", "b", "c"), launcher.path).ask() == {"a": "one", "b": "two", "c": "three"}


def test_hosts_knock_where_the_others_and_this_machine_listen(launcher, tmp_path):
    """The real question: a, which is this machine by another name, is told of b and of nothing else."""
    here = Listener().place | {"addresses": ["127.0.0.1"]}
    wrong = here | {"key": "00" * 16}
    launcher("a", 'eval "$1"')
    launcher("b", f'{answer("two", place=here)}; echo "$others" > {tmp_path}/told-b')
    assert Destinations(("a", "b"), launcher.path).ask() == {"a": describe()["machine"], "b": "two"}
    assert json.loads((tmp_path / "told-b").read_text()).keys() == {"a"}
    launcher("c", answer("three", place=wrong))  # something else answers there
    with pytest.raises(ConnectionError, match=r"^a does not reach c at 127\.0\.0\.1: "):
        Destinations(("a", "b", "c"), launcher.path).ask()
    launcher("d", f'{answer("four")}; echo "$others" > {tmp_path}/told-d')  # none of the hosts is this machine
    Destinations(("b", "d"), launcher.path).ask()
    assert json.loads((tmp_path / "told-d").read_text()).keys() == {"b", asking.HERE}


def test_where_no_input_comes_nothing_is_known_of_who_reaches_whom(launcher):
    launcher("a", f"echo '{json.dumps(describe() | {'machine': 'one', 'place': PLACE})}'")
    launcher("b", answer("two", misses=[]))
    assert Destinations(("a", "b"), launcher.path).ask() == {"a": "one", "b": "two"}


def test_hosts_that_are_asked_leave_nothing_behind(launcher, tmp_path):
    launcher("a", f"echo $$ > {tmp_path}/pid; sleep 60")
    launcher("b", f"while [ ! -s {tmp_path}/pid ]; do sleep 0.02; done; exit 3")
    with pytest.raises(ConnectionError, match=r"^b cannot run"):
        Destinations(("b", "a"), launcher.path).ask()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize("changed", ["flashmoe_numba/a.py", "reference/presets/b.toml", "flashmoe_numba/build/c.cu"])
def test_every_file_that_ranks_read_is_compared(tmp_path, changed):
    for name in ("flashmoe_numba/a.py", "reference/presets/b.toml", "flashmoe_numba/build/c.cu", "sim/d.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    before = source_of(tmp_path)
    cache = tmp_path / "reference/__pycache__"
    cache.mkdir()
    (cache / "b.pyc").write_text("1")
    (tmp_path / "sim/d.py").write_text("2")  # ranks do not simulate
    assert source_of(tmp_path) == before
    (tmp_path / changed).write_text("2")
    assert source_of(tmp_path) != before


@pytest.mark.parametrize(("name", "program"), [
    ("ssh", "ssh"), ("rsh", "rsh"), ("slurm", "srun"), ("ll", "poe"), ("lsf", "blaunch"), ("sge", "qrsh"),
])  # fmt: skip
def test_a_launcher_whose_program_is_not_here_is_named(capsys, monkeypatch, tmp_path, name, program):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main([*TINY, "--hosts", "a", "--launcher", name]) == 2
    expected = f"flashmoe run: error: argument --launcher: {name} needs {program}, which is not in PATH here\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(("flags", "message"), [
    (["--hosts", "a,b,c,d"], "argument --ranks: must be a multiple of the 4 hosts, which get as many ranks each; g"),
    (["--hosts", "a,a"], "argument --hosts: each host must be named once, got a 2 times"),
    (["--hosts", "a", "--launcher", "none"], "argument --launcher: launcher must be one of ssh, rsh, slurm, ll, lsf"),
    (["--hosts", "a", "--launcher", ""], "argument --launcher: launcher must be one of ssh, rsh, slurm, ll, lsf"),
    (["--hosts", "a", "--launcher", "true"], "argument --hosts: a, asked by true, gave no answer that can be read"),
    (["--launcher", "ssh"], "argument --launcher: goes with --hosts, got 'ssh' without"),
    (["--launcher", ""], "argument --launcher: goes with --hosts, got '' without"),
    (["--hosts", "a", "--threads"], "argument --threads: not allowed with argument --hosts"),
    (["--hosts", "a", "--backend", "fibers"], "argument --hosts: goes with --backend cpu, got fibers"),
    (["--hosts", "a", "--trace", "t.json"], "argument --trace: goes with ranks of one machine: clocks of several"),
])  # fmt: skip
def test_flags_that_do_not_fit(capsys, monkeypatch, tmp_path, flags, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*TINY, *flags]) == 2
    assert capsys.readouterr().err.startswith(f"flashmoe run: error: {message}")


@pytest.mark.parametrize(("command", "message"), [
    (TINY, "the hosts are those of this mpirun: start this without --hosts"),
    (["doctor"], "flashmoe doctor starts a rank on each host itself: start this without mpirun"),
])  # fmt: skip
def test_inside_a_users_mpirun_hosts_are_its_own(capsys, monkeypatch, command, message):
    monkeypatch.setenv("PMI_RANK", "0")
    assert cli.main([*command, "--hosts", "a,b"]) == 2
    assert capsys.readouterr().err == f"flashmoe {command[0]}: error: argument --hosts: {message}\n"


@pytest.fixture
def mpirun(monkeypatch):
    """A stand-in for mpirun, which says what it is told to; `mpirun.started` has its command and environment."""

    def make(said, code=0):
        monkeypatch.setattr(launch, "find_mpirun", lambda: "/some/mpirun")
        popen = launch.subprocess.Popen

        def start(command, **settings):
            make.started = command, settings["env"]
            script = 'printf %s "$1"; exit "$2"'
            return popen(["sh", "-c", script, "sh", said, str(code)], **settings)

        monkeypatch.setattr(launch.subprocess, "Popen", start)
        monkeypatch.setattr(Destinations, "ask", lambda self: {})

    return make


def test_run_starts_the_ranks_there(launcher, mpirun, capfd):
    mpirun("no JSON\n", 3)
    assert cli.main([*TINY, "--hosts", "a,b", "--launcher", launcher.path]) == 3
    command, environment = mpirun.started
    where = ["-launcher", "ssh", "-launcher-exec", launcher.path, "-hosts", "a,b", "-ppn", "3", "-n", "6"]
    assert command[:10] == ["/some/mpirun", *where][:10]
    chosen = {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp", "HYDRA_RMK": "user"}
    assert environment.items() >= chosen.items()
    assert environment[launch.COMMAND_VARIABLE].startswith(f"{sys.executable} -Pm flashmoe_numba run --preset")
    assert capfd.readouterr().out == "no JSON\n"


LINK = {"source": 0, "target": 1, "latency_ns": 9000.0, "gbps": 1.0}
MEASURED = {"netmod": "ofi/tcp", "survives_a_lost_rank": True, "fix": "", "threads": True, "hosts": ["a", "b"]}
MEASURED |= {"links": [LINK], "core_gbps": 0.5}


def test_what_ranks_found_is_written_where_the_command_was_given(launcher, mpirun, capfd, monkeypatch, tmp_path):
    mpirun(json.dumps(MEASURED))
    monkeypatch.chdir(tmp_path)
    Path("my.toml").write_text(to_toml(load_hardware("2xH100")))
    flags = ["--hosts", "a,b", "--launcher", launcher.path, "--json", "new/doctor.json", "--machine-file", "my.toml"]
    assert cli.main(["doctor", *flags]) == 0
    assert mpirun.started[1][launch.COMMAND_VARIABLE].endswith(" --json -")  # the last one counts
    assert json.loads(Path("new/doctor.json").read_text()) == MEASURED
    assert load_hardware("my.toml").nic_latency_ns == 9000
    assert re.search(r"ok +a to b +9\.0 us", capfd.readouterr().out)
    assert cli.main(["doctor", *flags[:4], "--json", "-"]) == 0
    assert json.loads(capfd.readouterr().out) == MEASURED


def test_what_was_measured_is_shown_also_where_it_cannot_be_written(launcher, mpirun, capfd, monkeypatch, tmp_path):
    mpirun(json.dumps(MEASURED))
    (tmp_path / "my.toml").write_text(to_toml(load_hardware("2xH100")))
    monkeypatch.setattr(doctor_hosts, "require_answers", lambda hosts: (tmp_path / "my.toml").unlink())
    flags = ["--hosts", "a,b", "--launcher", launcher.path, "--machine-file", str(tmp_path / "my.toml")]
    assert cli.main(["doctor", *flags]) == 2
    said = capfd.readouterr()
    assert "a to b" in said.out and "--hardware" not in said.out
    assert re.search(r"argument --machine-file: hardware file \S+my.toml: no such file", said.err)


def test_no_folder_is_made_before_hosts_have_answered(launcher, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    launcher("a", answer("one"))
    for command in (["doctor"], [*TINY, "--ranks", "2"]):
        flags = ["--hosts", "a,b", "--launcher", launcher.path, "--json", "new/found.json"]
        assert cli.main([*command, *flags]) == 2
        assert "b cannot be reached by" in capsys.readouterr().err and not Path("new").exists()


@pytest.mark.parametrize(("flags", "message"), [
    (["--hosts", "a"], "argument --hosts: needs two hosts or more to measure between them, got a"),
    (["--machine-file", "x.toml"], "argument --machine-file: goes with --hosts, got x.toml without"),
    (["--hosts", "a,b", "--machine-file", "x"], "argument --machine-file: must end in .toml, got 'x'"),
    (["--hosts", "a,b", "--machine-file", "x.toml"], "argument --machine-file: hardware file x.toml: no such file"),
    (["--launcher", "ssh"], "argument --launcher: goes with --hosts, got 'ssh' without"),
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
