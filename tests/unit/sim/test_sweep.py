"""Sweeps: what a grid means, that a file survives its writers, and that rows do not depend on how they are run."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from flashmoe_numba import cli
from flashmoe_numba.processes import launch
from flashmoe_numba.processes.pools import process_pool
from sim.policies.outside import TEMPLATE
from sim.simulation import simulate
from sim.studies.grid import load_grid
from sim.studies.point import LATER
from sim.studies.sweep import RowFile, missing, read_rows, run_point, run_points
from sim.world.machine_files import load_hardware, to_toml

WHOLE = ("seeds", "layer", "replicas", "capacity")
ROOT = Path(__file__).resolve().parents[3]
HEAD = 'schema = 1\n[grid]\npolicy = ["flashmoe"]\nhardware = ["2xH100"]\npreset = ["laptop-tiny"]\n'
GRID = (
    HEAD.replace('"2xH100"', '"1xH100", "2xH100"')
    + 'tokens = [7, 20]\nexperts = [3, 4, 32]\nrouting = ["even", "zipf:1"]\n'
    + "[knobs]\nflashmoe = [{}, {ladder = true}]\n"
)


pytestmark = pytest.mark.usefixtures("outside_mpirun")


@pytest.fixture
def grid(tmp_path):
    return write(tmp_path, GRID)


def write(folder, text):
    path = folder / "grid.toml"
    path.write_text(text, encoding="utf-8")
    return path


def by_key(rows):
    return {row["key"]: row for row in rows}


def test_a_grid_is_all_combinations_each_once(tmp_path, grid):
    points = load_grid(grid)
    assert len(points) == len({point.key for point in points}) == 2 * 2 * 3 * 2 * 2
    assert {point.experts for point in points} == {3, 4, 32}
    assert {point.hidden for point in points} == {16}, "sizes that are not given are the preset's"
    assert load_grid(write(tmp_path, GRID.replace("[7, 20]", "[7, 20, 7]"))) == points


def test_keys_are_of_the_parameters_alone(tmp_path, grid):
    before = [point.key for point in load_grid(grid)]
    (one,) = load_grid(write(tmp_path, HEAD))
    assert one.key == "2b018feacf79e987", (
        "the same on every machine and in every version, or files could not be gone on with"
    )
    changes = ("replicas = [0]", 'rounding = ["up"]', 'terms = ["schedule"]', "layer = [0]", "seeds = [2]")
    changes += ('passes = ["training"]', "capacity = [1]")
    for change in (
        *changes,
        "seed = [1]",
        "topk = [1]",
        "gated = [false]",
        "capacity_factor = [1]",
        'precision = ["fp8"]',
    ):
        (other,) = load_grid(write(tmp_path, HEAD + change))
        assert other.key != one.key
    assert len(set(before)) == len(before)


def test_a_row_has_every_parameter_and_the_report(grid):
    point = next(point for point in load_grid(grid) if point.hardware == "2xH100" and point.experts == 4)
    row = run_point(point)
    assert row.keys() > {
        "key",
        "ranks",
        "policy",
        "hardware",
        "preset",
        "tokens",
        "experts",
        "topk",
        "routing",
        "knobs",
    }
    assert (row["ranks"], row["report"]["ranks"]) == (2, 2)
    assert row["report"]["latency_us"] == simulate("flashmoe", point.world()).latency_us
    assert json.loads(json.dumps(row, allow_nan=False)) == row


def test_capacity_is_that_of_the_factor(tmp_path):
    sizes = "tokens = [10]\nexperts = [4]\ntopk = [2]\ncapacity_factor = [0.5, 1.0, 100.0, 1e308]\n"
    worlds = [point.world() for point in load_grid(write(tmp_path, HEAD + sizes))]
    assert [world.config.capacity for world in worlds] == [3, 6, 10, 10]
    assert worlds[0].routing.counts.max() <= 3


def test_capacity_is_that_of_sim(tmp_path, capsys):
    sizes = 'routing = ["hot"]\ntokens = [10]\nexperts = [4]\ntopk = [2]\ncapacity = ["none", 3, 11]\n'
    rows = [run_point(point) for point in load_grid(write(tmp_path, HEAD + sizes))]
    limited = [(row["capacity"], row["report"]["capacity"], row["report"]["dropped"]) for row in rows[:2]]
    assert limited[0] == (None, None, 0) and limited[1][:2] == (3, 3) and limited[1][2] >= 2 * (10 - 3)
    flags = ["--preset", "laptop-tiny", "--hardware", "2xH100", "--precision", "bfloat16", "--routing", "hot"]
    flags += ["--tokens", "10", "--experts", "4", "--topk", "2", "--capacity", "3", "--json", "-"]
    assert cli.main(["sim", *flags]) == 0
    (same,) = json.loads(capsys.readouterr().out)
    assert rows[1]["report"].items() <= same.items()
    assert rows[2]["error"] == "capacity must be in [1, num_tokens=10] or None, got 11"


def test_what_sim_can_ask_for_a_grid_can(tmp_path):
    axes = (
        'replicas = ["none", 0, 4]\nrounding = ["none", "up"]\nterms = ["system", "schedule"]\nrouting = ["zipf:1"]\n'
    )
    sets = "tokens = [40]\n[knobs]\nflashmoe = [{tile_m = 16}]\n"
    points = {(p.replicas, p.rounding, p.terms): p for p in load_grid(write(tmp_path, HEAD + axes + sets))}
    assert len(points) == 12
    copied = points[4, "up", "schedule"].world().routing
    assert copied.num_experts == 12 and copied.name == "zipf:1, rounded (up) to 16, 4 replicas"
    placed, blocked = (points[replicas, None, "system"].world().routing.name for replicas in (0, None))
    assert (placed, blocked) == ("zipf:1, placed", "zipf:1")
    row = run_point(points[None, None, "schedule"])
    assert (row["report"]["rate"], row["report"]["knobs"]["tile_m"], row["report"]["knobs"]["tile_n"]) == (0.6, 16, 256)
    (bad,) = load_grid(write(tmp_path, HEAD.replace("flashmoe", "megamoe") + 'rounding = ["up"]\n'))
    assert run_point(bad)["error"] == "policy megamoe chooses its row tile: set its knob tile_m"


def test_a_grid_has_passes(tmp_path):
    points = load_grid(write(tmp_path, HEAD + 'passes = ["forward", "backward", "training"]\n'))
    rows = [run_point(point) for point in points]
    assert [row["report"]["passes"] for row in rows] == [row["passes"] for row in rows]
    forward, back, both = (row["report"]["latency_us"] for row in rows)
    assert both > max(forward, back)
    (bad,) = load_grid(write(tmp_path, HEAD.replace("flashmoe", "megamoe") + 'passes = ["training"]\n'))
    assert "passes must be forward with policy megamoe" in run_point(bad)["error"]


def test_seeds_of_a_point_are_a_row_with_their_spread(tmp_path):
    text = HEAD + 'routing = ["zipf:1"]\ntokens = [300]\n'
    alone = sorted(
        run_point(p)["report"]["latency_us"] for p in load_grid(write(tmp_path, text + "seed = [3, 4, 5]\n"))
    )
    (point,) = load_grid(write(tmp_path, text + "seed = [3]\nseeds = [3]\n"))
    said = run_point(point)["report"]
    spread = {"median": alone[1], "min": alone[0], "max": alone[2]}
    assert said["spread"]["latency_us"] == spread and said["latency_us"] == alone[1]
    assert alone[0] < alone[2]


def test_rows_from_before_an_axis_came_are_gone_on_with(tmp_path):
    (point,) = load_grid(write(tmp_path, HEAD))
    row = run_point(point)
    old = {name: value for name, value in row.items() if name not in LATER}
    (tmp_path / "old.jsonl").write_text(json.dumps(old) + "\n")
    assert read_rows(tmp_path / "old.jsonl") == [row]
    assert missing([point], read_rows(tmp_path / "old.jsonl")) == []


@pytest.mark.parametrize("axis", sorted(LATER))
def test_rows_that_differ_in_a_later_axis_are_all_read(tmp_path, axis):
    file = tmp_path / "rows.jsonl"
    (point,) = load_grid(write(tmp_path, HEAD))
    one, two = ("a", "b") if isinstance(LATER[axis] or "", str) and axis not in WHOLE else (5, 6)
    lines = [point.row() | {"key": str(value), axis: value} for value in (one, two, one)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [row[axis] for row in read_rows(file)] == [one, two]


@pytest.mark.parametrize("change", [
    {"hardware": 5}, {"tokens": "7"}, {"knobs": [1]}, {"ranks": 0}, {"ranks": 1.5}, {"capacity_factor": "1"},
    {"layer": "x"}, {"key": 3}, {"report": []}, {"report": {}}, {"report": {"latency_us": None}},
    {"report": {"latency_us": "fast"}}, {"report": {"resident": 1e300}}, {"report": {"useful": True}},
    {"report": {"tensor_busy": -0.1}},
])  # fmt: skip
def test_a_row_whose_values_cannot_be_is_named(tmp_path, change):
    (point,) = load_grid(write(tmp_path, HEAD))
    good, file = run_point(point), tmp_path / "rows.jsonl"
    partial = change.get("report") or {}
    bad = good | change | ({"report": good["report"] | partial} if partial else {})
    file.write_text("".join(json.dumps(row) + "\n" for row in (good, bad, good)))
    with pytest.raises(ValueError, match="line 2 is no row of a sweep"):
        read_rows(file)
    file.write_text(json.dumps(good) + "\n")
    assert read_rows(file) == [good]


def test_an_impossible_combination_is_a_row_that_says_why(grid):
    rows = [run_point(point) for point in load_grid(grid)]
    assert {row["error"] for row in rows if "error" in row} == {
        "num_experts must be a multiple of num_ranks=2, got 3",
    }
    assert sum("error" in row for row in rows) == 2 * 2 * 2
    assert all(("error" in row) != ("report" in row) for row in rows)


def test_more_tokens_than_a_gpu_holds_are_known_before_they_are_routed(tmp_path):
    (point,) = load_grid(write(tmp_path, HEAD + "tokens = [1000000000]"))
    assert "the rows that a rank sends need" in run_point(point)["error"]


def test_rows_do_not_depend_on_the_number_of_jobs(tmp_path, grid, capsys):
    files = [tmp_path / name for name in ("one.jsonl", "two.jsonl")]
    for jobs, file in enumerate(files, start=1):
        assert cli.main(["sweep", str(grid), "--out", str(file), "--jobs", str(jobs)]) == 0
    one, two = map(read_rows, files)
    assert len(one) == len(two) == 48
    assert by_key(one) == by_key(two)
    assert "48 simulated rows of the grid are in" in capsys.readouterr().out


def test_half_a_sweep_with_a_torn_line_is_gone_on_with(tmp_path, grid):
    points, file = load_grid(grid), tmp_path / "rows.jsonl"
    with RowFile(file) as rows:
        for row in run_points(missing(points, [])[:20]):
            rows.append(row)
    whole = file.read_bytes()
    last = len(whole.splitlines()[-1])
    for torn in (1, 5, last - 1):
        file.write_bytes(whole[: len(whole) - last - 1 + torn])
        assert len(read_rows(file)) == 19
        aside = tmp_path / "rows.jsonl.damaged"
        aside.unlink(missing_ok=True)
        with RowFile(file) as rows:
            assert rows.aside == aside
            assert aside.read_bytes() == whole.splitlines()[-1][:torn] + b"\n"
            left = missing(points, rows.rows)
            assert len(left) == len(points) - 19
            for row in run_points(left):
                rows.append(row)
        assert by_key(read_rows(file)) == by_key(map(run_point, points))
        assert len(read_rows(file)) == len(points)


def test_a_sweep_that_is_killed_is_gone_on_with(tmp_path):
    grid = write(tmp_path, GRID.replace("[7, 20]", str(list(range(100, 140)))))
    points, file = load_grid(grid), tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "flashmoe_numba", "sweep", str(grid), "--out", str(file), "--jobs", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    wait_for_rows(file, 3)
    process.kill()
    process.communicate()
    before = read_rows(file)
    assert 3 <= len(before) < len(points)
    with RowFile(file) as rows:
        assert rows.rows == before
        left = missing(points, before)
        assert len(left) == len(points) - len(before)
        rows.append(run_point(left[0]))
    assert read_rows(file) == [*before, run_point(left[0])]


def wait_for_rows(file, number):
    deadline = time.monotonic() + 60
    while not file.exists() or file.read_bytes().count(b"\n") < number:
        assert time.monotonic() < deadline, "the sweep writes nothing"
        time.sleep(0.02)


def test_ctrl_c_says_how_to_go_on(tmp_path):
    grid = write(tmp_path, GRID.replace("[7, 20]", str(list(range(100, 140)))))
    file = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "flashmoe_numba", "sweep", str(grid), "--out", str(file), "--jobs", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for_rows(file, 3)
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate()[1]
    assert process.returncode == 130
    assert error == (
        f"flashmoe sweep: interrupted; {len(read_rows(file))} of 960 rows are in {file}, "
        "and the same command goes on from there\n"
    )


def test_a_worker_that_dies_stops_the_sweep_with_a_word(tmp_path, grid, capsys, monkeypatch):
    monkeypatch.setattr("flashmoe_numba.commands.sweep.run_points", die)
    assert cli.main(["sweep", str(grid), "--out", str(tmp_path / "rows.jsonl"), "--jobs", "2"]) == 1
    assert "a process died, maybe for lack of memory: try fewer --jobs; 0 of 48 rows" in capsys.readouterr().err


def die(points, pool):
    yield pool.submit(os._exit, 1).result()


def test_processes_end_with_their_pool():
    with process_pool(1) as pool:
        pid = pool.submit(os.getpid).result()
        assert Path(f"/proc/{pid}").exists()
        pool.submit(time.sleep, 60)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.mpi
def test_rows_of_an_mpirun_are_the_same(tmp_path, grid):
    file = tmp_path / "rows.jsonl"
    command = [launch.find_mpirun(), "-n", "2", sys.executable, "-m", "flashmoe_numba", "sweep", str(grid)]
    subprocess.run([*command, "--out", str(file)], cwd=ROOT, check=True, timeout=100, capture_output=True)
    assert by_key(read_rows(file)) == by_key(map(run_point, load_grid(grid)))


@pytest.mark.parametrize(("text", "message"), [
    ("schema = 1\n[grid\n", " is no TOML: Expected ']' at the end of a table declaration (at line 2, column 6)"),
    (HEAD.replace("1\n", "2\n", 1), ": schema must be 1, got 2"),
    (HEAD + "token = [1]", ": [grid] must have only policy, hardware, preset, tokens, "),
    (HEAD + "[knob]", ": the file must have only schema, grid, knobs; unknown: knob"),
    (HEAD.replace("policy", "policies"),
     ": [grid] must have policy, hardware, preset; missing: policy; unknown: policies"),
    ("schema = 1\ngrid = 3", ": [grid] must be a table, got 3"),
    ('schema = 1\n[grid]\npolicy = ["flashmoe"]', ": [grid] must have policy, hardware, preset; missing: hardware"),
    (HEAD + "tokens = 5", ": [grid] tokens must be a list of integers, got 5"),
    (HEAD + 'rounding = ["away"]', ": [grid] rounding: rounding must be one of nearest, up, down; got 'away'"),
    (HEAD + 'passes = ["back"]', ": [grid] passes: passes must be one of forward, backward, training; got 'back'"),
    (HEAD + 'terms = ["own"]', ": [grid] terms: terms must be one of system, schedule; got 'own'"),
    (HEAD + 'replicas = ["some"]', """: [grid] replicas must be a list of integers, or "none", got 'some' in it"""),
    (HEAD + "replicas = [-1]", ": [grid] replicas must be at least 0, got -1"),
    (HEAD + "seeds = [0]", ": [grid] seeds must be at least 1, got 0"),
    (HEAD + 'seeds = ["none"]', ": [grid] seeds must be a list of integers, got 'none' in it"),
    (HEAD + f"tokens = {[*range(1, 1002)]}\nhidden = {[*range(1, 1001)]}",
     ": [grid] must have at most 1,000,000 combinations, got 1,001,000"),
    (HEAD + "tokens = []", ": [grid] tokens must be a list of integers, got []"),
    (HEAD + "tokens = [true]", ": [grid] tokens must be a list of integers, got True in it"),
    (HEAD + "tokens = [0]", ": [grid] tokens must be at least 1, got 0"),
    (HEAD + "gated = [1]", ": [grid] gated must be a list of true or false, got 1 in it"),
    (HEAD + "capacity_factor = [nan]", ": [grid] capacity_factor must be positive, got nan"),
    (HEAD + "capacity = [0]", ": [grid] capacity must be at least 1, got 0"),
    (HEAD + "capacity = [2.5]", """: [grid] capacity must be a list of integers, or "none", got 2.5 in it"""),
    (HEAD + "capacity = [2]\ncapacity_factor = [1]",
     ": [grid] must have one of capacity and capacity_factor, which say the same limit; got both"),
    (HEAD + 'routing = ["cold"]', ": [grid] routing: name must be one of: even, uniform"),
    (HEAD + 'routing = ["no.npz"]', ": [grid] routing: no such recording: no.npz"),
    (HEAD + 'precision = ["int4"]', ": [grid] precision: precision must be one of"),
    (HEAD.replace("2xH100", "9xH100"), ": [grid] hardware: hardware '9xH100': H100 has at least one node and 1 to 8"),
    (HEAD.replace("flashmoe", "flushmoe"), ": [grid] policy: policy must be one of flashmoe"),
    (HEAD.replace("laptop-tiny", "laptop"), ": [grid] preset: preset must be one of"),
    (HEAD + "[knobs]\nflashmoe = {ladder = true}", ": [knobs] flashmoe must be a list of tables, got {'ladder': True}"),
    (HEAD + "[knobs]\nflashmoe = [{lader = true}]", ": [knobs] flashmoe: policy flashmoe has the knobs rate, "),
    (HEAD + "[knobs]\nflashmoe = [{tile_m = true}]", ": [knobs] flashmoe: tile_m must be of type int, got True"),
    (HEAD + "[knobs]\nflashmoe = [{rate = 'high'}]", ": [knobs] flashmoe: rate must be of type float, got 'high'"),
    (HEAD + "[knobs]\nflushmoe = [{}]", ": [knobs] must be for policies of [grid], flashmoe; got flushmoe"),
])  # fmt: skip
def test_a_bad_grid_is_one_line(tmp_path, capsys, text, message):
    path = write(tmp_path, text)
    assert cli.main(["sweep", str(path), "--out", str(tmp_path / "rows.jsonl")]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"flashmoe sweep: error: {path}{message}")
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.mark.parametrize("content", [b"notes of mine", b"notes\n", b"{}\n", b'{"key": "a"}\n', b'[]\n{"k'])
def test_somebody_elses_file_is_left_alone(tmp_path, grid, capsys, content):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    assert cli.main(["sweep", str(grid), "--out", str(file)]) == 2
    assert f"argument --out: {file}: line " in capsys.readouterr().err
    assert file.read_bytes() == content


def test_a_device_is_no_file_for_rows(grid, capsys):
    assert cli.main(["sweep", str(grid), "--out", "/dev/zero"]) == 2
    assert "argument --out: /dev/zero: must be a file or not there yet" in capsys.readouterr().err


def test_two_sweeps_do_not_share_a_file(tmp_path, grid, capsys):
    file = tmp_path / "rows.jsonl"
    with RowFile(file):
        assert cli.main(["sweep", str(grid), "--out", str(file)]) == 2
    assert "another sweep is writing to this file" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "message"), [
    (["none.toml", "--out", "x"], "none.toml: no such file"),
    ([".", "--out", "x"], ".: no such file"),
    (["none.toml"], "the following arguments are required: --out"),
    (["none.toml", "--out", "x", "--jobs", "0"], "argument --jobs: must be an integer >= 1, got '0'"),
])  # fmt: skip
def test_bad_flags_are_one_line(capsys, flags, message):
    assert cli.main(["sweep", *flags]) == 2
    assert capsys.readouterr().err == f"flashmoe sweep: error: {message}\n"


@pytest.mark.parametrize("path", sorted((ROOT / "experiments/grids").glob("*.toml")), ids=lambda path: path.stem)
def test_the_example_grids_are_grids(path):
    assert len(load_grid(path)) >= 12


TINY = HEAD + "tokens = [5, 6, 7]"


@pytest.mark.parametrize("damage", [
    lambda line: line[:30], lambda line: b"\0" * 4096, lambda line: line[:9] + b"\0\0" + line[11:], lambda line: b"x\n"
])  # fmt: skip
def test_a_damaged_last_line_is_set_aside_and_computed_again(tmp_path, capsys, damage):
    """Cut off, a page of zeros after a loss of power, a hole, or something else that was written."""
    grid, file = write(tmp_path, TINY), tmp_path / "rows.jsonl"
    assert cli.main(["sweep", str(grid), "--out", str(file), "--jobs", "1"]) == 0
    *rows, last = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(rows) + damage(last))
    capsys.readouterr()
    assert cli.main(["sweep", str(grid), "--out", str(file), "--jobs", "1"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"3 simulated rows of the grid are in {file}, 1 of them new")
    assert err.startswith(f"flashmoe sweep: the last line of {file} was damaged, ")
    assert err.endswith(f": it is in {file}.damaged now, and is computed again\n")
    assert file.read_bytes() == b"".join(rows) + last
    assert Path(f"{file}.damaged").read_bytes() == damage(last).removesuffix(b"\n") + b"\n"
    assert cli.main(["sweep", str(grid), "--out", str(file), "--jobs", "1"]) == 0
    assert capsys.readouterr().err == "", "it is whole again"


@pytest.mark.parametrize("damage", [lambda lines: lines[0][:50] + b"\n", lambda lines: b'{"key": "a"}\n'])
def test_other_damage_names_the_line_and_the_remedy(tmp_path, capsys, damage):
    grid, file = write(tmp_path, TINY), tmp_path / "rows.jsonl"
    assert cli.main(["sweep", str(grid), "--out", str(file), "--jobs", "1"]) == 0
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([lines[0], damage(lines), lines[2]]))
    before = file.read_bytes()
    capsys.readouterr()
    assert cli.main(["sweep", str(grid), "--out", str(file), "--jobs", "1"]) == 2
    said = capsys.readouterr().err
    assert f"argument --out: {file}: line 2 is no row of a sweep; if others are, delete it (sed -i 2d {file})" in said
    assert file.read_bytes() == before
    subprocess.run(said.partition("(")[2].partition(")")[0], shell=True, check=True)
    assert cli.main(["sweep", str(grid), "--out", str(file), "--jobs", "1"]) == 0
    assert by_key(map(json.loads, lines)) == by_key(read_rows(file))


def test_a_grid_of_machines_from_files_and_several_policies(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "box.toml").write_text(to_toml(replace(load_hardware("2xH100"), name="box", nvlink_gbps=20.0)))
    text = HEAD.replace('"2xH100"', '"2xH100", "box.toml", "2xbox.toml"').replace('"flashmoe"', '"flashmoe", "bulk"')
    grid, file = write(tmp_path, text + "tokens = [512]"), tmp_path / "rows.jsonl"
    assert cli.main(["sweep", str(grid), "--out", str(file), "--jobs", "2"]) == 0
    found = {(row["policy"], row["hardware"]): row for row in read_rows(file)}
    assert len(found) == 6
    for (_, hardware), row in found.items():
        assert row["ranks"] == (4 if hardware == "2xbox.toml" else 2)
        assert row["report"]["rate_fitted"], "the box has the H100's chip"
    for policy in ("flashmoe", "bulk"):
        fast, slow = (found[policy, name]["report"]["latency_us"] for name in ("2xH100", "box.toml"))
        assert slow > fast
    assert cli.main(["plot", str(file), "--out", "figures", "--where", "ranks=2"]) in (0, 1)
    assert "Traceback" not in capsys.readouterr().err


def test_a_file_that_was_changed_makes_new_rows_which_readers_have_in_place_of_the_old(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    machine, policy = tmp_path / "box.toml", tmp_path / "my.py"
    machine.write_text(to_toml(load_hardware("2xH100")))
    policy.write_text(TEMPLATE.read_text(encoding="utf-8"))
    grid = write(tmp_path, HEAD.replace('"2xH100"', '"2xbox.toml"').replace('"flashmoe"', '"my.py", "flashmoe"'))
    new = []
    for change in (None, machine, policy):
        if change is not None:
            text = change.read_text(encoding="utf-8")
            change.write_text(
                text.replace("nvlink_gbps = 370", "nvlink_gbps = 37").replace("tile_n: int = 128", "tile_n: int = 16")
            )
        assert cli.main(["sweep", str(grid), "--out", "rows.jsonl", "--jobs", "1"]) == 0
        new.append(int(capsys.readouterr().out.partition("rows.jsonl, ")[2].split()[0]))
        rows = {row["policy"]: row for row in read_rows(tmp_path / "rows.jsonl")}
        assert by_key(rows.values()) == by_key(map(run_point, load_grid(grid)))
    assert new == [2, 2, 1], "two with the machine, one with the policy"
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 5
