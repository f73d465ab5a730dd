"""Policies by the path of a file and by what packages offer: they run as the others do, and what is wrong is told."""

import json
import sys
from dataclasses import replace

import pytest
from policy_worlds import assert_computed_once, assert_link_bytes, odd_worlds, run_policy, small_world

import sim
from flashmoe_numba import cli
from sim.engine.kinds import COMBINE, SHARED0, SHARED1
from sim.policies.outside import TEMPLATE, installed
from sim.studies.what_if import changes

KNOBS = """
from dataclasses import dataclass
from sim import PolicyKnobs
@dataclass(frozen=True, kw_only=True)
class Knobs(PolicyKnobs):
    tile_m: int = 128
"""
WORLDS = odd_worlds()


@pytest.fixture
def mine(tmp_path):
    """The path of a file like the template."""
    path = tmp_path / "mine.py"
    path.write_text(TEMPLATE.read_text(encoding="utf-8"), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", WORLDS)
def test_the_template_moves_and_computes_every_row_once(mine, name):
    graph, timeline = run_policy(str(mine), WORLDS[name], tile_m=16)
    assert_computed_once(graph, WORLDS[name])
    assert_link_bytes(graph, timeline, WORLDS[name])


def test_a_copy_of_a_policy_is_that_policy(tmp_path):
    """But for its rate, which nobody has fitted."""
    path = tmp_path / "copy.py"
    source = (TEMPLATE.parent / "bulk.py").read_text(encoding="utf-8").replace("from ..", "from sim.")
    path.write_text(source, encoding="utf-8")
    world = small_world()
    knobs = {"rate": 0.6, "num_ops": 17}
    theirs = sim.simulate("bulk", world, sim.make_knobs("bulk", knobs))
    ours = sim.simulate(str(path), world, sim.make_knobs(str(path), {"num_ops": 17}))
    assert (ours.timeline.done_ns == theirs.timeline.done_ns).all()
    assert (sim.report(ours).rate, sim.report(ours).rate_fitted) == (0.6, False)


def test_an_edit_counts_at_once(mine):
    world = small_world()
    before = sim.simulate(str(mine), world).timeline.makespan_ns
    last = "draft.combine_kernel(draft.begin(returned))"
    mine.write_text(mine.read_text().replace(last, "pass".ljust(len(last))))  # as many bytes, within a second
    after = sim.simulate(str(mine), world)
    assert after.timeline.makespan_ns < before
    assert not (after.graph.nodes["kind"] == COMBINE).any()


def test_what_if_changes_its_knobs(mine):
    names = [change.name for change in changes(sim.simulate(str(mine), small_world()))]
    assert "knob tile_n = 64" in names


def test_a_shared_expert_must_be_in_the_graph(mine):
    world = small_world()
    world = replace(world, config=replace(world.config, shared_ffn=64))
    graph = sim.simulate(str(mine), world).graph
    assert {SHARED0, SHARED1} <= set(graph.nodes["kind"])
    mine.write_text(mine.read_text().replace("draft.begin(shared)", "draft.begin()").replace("shared = ", "if 0: "))
    with pytest.raises(ValueError, match=r"shared_ffn must be 0 with policy .*mine.py and these knobs, which leave"):
        sim.simulate(str(mine), world)


BAD = [  # what a file holds, and what is said of it
    ("def build(world, knobs): pass", "must have a class Knobs that extends sim.PolicyKnobs, got None"),
    ("class Knobs: pass\ndef build(world, knobs): pass", "must have a class Knobs that extends sim.PolicyKnobs, got <"),
    (KNOBS, r"must have a function build\(world, knobs\)"),
    (
        KNOBS.replace("@dataclass(frozen=True, kw_only=True)", "") + "build = print",
        "Knobs must be decorated with @data",
    ),
    (KNOBS.replace("= 128", "") + "build = print", r"Knobs\(\) with its defaults: cannot .* TypeError: .*'tile_m'"),
    (
        KNOBS.replace("128", "'high'") + "build = print",
        "cannot be imported: TypeError: tile_m must be of type int, got",
    ),
    ("\n\nimport no_such_module", "line 3: cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
    ("x = 1\n1 / 0", "line 2: cannot be imported: ZeroDivisionError: division by zero"),
    ("x = 1\nx = (", r"line 2: cannot be imported: SyntaxError: '\(' was never closed"),
    ("raise SystemExit(3)", "line 1: cannot be imported: SystemExit: 3"),
]


@pytest.mark.parametrize(("source", "message"), BAD, ids=range(len(BAD)))
def test_a_file_that_is_no_policy_is_told(tmp_path, source, message):
    path = tmp_path / "bad.py"
    path.write_text(source)
    with pytest.raises(ValueError, match=rf"^policy file {path}[:,] ?.*{message}"):
        sim.make_knobs(str(path), {})


def test_no_such_file_and_no_such_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"policy file .*none.py: no such file; flashmoe sim --new-policy"):
        sim.simulate(str(tmp_path / "none.py"), small_world())
    with pytest.raises(ValueError, match=r"policy must be one of flashmoe, .*group flashmoe.policies; got 'none'"):
        sim.simulate("none", small_world())
    with pytest.raises(TypeError, match=r"policy must be a name or the path of a \.py file, got 3"):
        sim.simulate(3, small_world())


@pytest.mark.parametrize(("source", "error", "message"), [
    ("return None", TypeError, "build of policy .*bad.py must return a TaskGraph, .* got None"),
    ("raise ValueError('too few')", ValueError, r"too few \(line 8 of .*bad.py\)"),
    ("import numpy\n    return numpy.zeros(3) + numpy.zeros(4)", ValueError, r"\(3,\) \(4,\) +\(line 9 of .*bad.py\)"),
])  # fmt: skip
def test_what_a_build_does_wrong_names_the_line(tmp_path, source, error, message):
    path = tmp_path / "bad.py"
    path.write_text(f"{KNOBS}def build(world, knobs):\n    {source}")
    with pytest.raises(error, match=message):
        sim.simulate(str(path), small_world())


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that is installed as far as Python's metadata go, and offers a policy."""
    (tmp_path / "my_package.py").write_text(TEMPLATE.read_text(encoding="utf-8"), encoding="utf-8")
    about = tmp_path / "my_package-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    offers = "offered = my_package\nbulk = nowhere\nbroken = nowhere_at_all\n"
    (about / "entry_points.txt").write_text(f"[flashmoe.policies]\n{offers}")
    monkeypatch.syspath_prepend(tmp_path)
    installed.cache_clear()
    yield
    sys.modules.pop("my_package", None)
    installed.cache_clear()


@pytest.mark.usefixtures("package")
def test_what_a_package_offers_is_a_policy_by_name():
    assert sim.policy_names() == (*sim.POLICY_NAMES, "broken", "offered")
    assert sim.simulate("offered", small_world()).latency_us > 0
    assert sim.simulate("bulk", small_world()).latency_us > 0, "the name belongs to this package"
    with pytest.raises(ValueError, match="policy broken of nowhere_at_all: cannot be imported: ModuleNotFoundError"):
        sim.simulate("broken", small_world())


SMALL = ["--preset", "laptop-text", "--hardware", "4xH100", "--tokens", "64"]


def test_a_new_policy_runs_as_it_is_in_every_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sim", "--new-policy", "my.py"]) == 0
    assert capsys.readouterr().out == "my.py is a schedule that runs as it is: flashmoe sim --policy my.py\n"
    assert cli.main(["sim", "--policy", "my.py"]) == 0
    assert "shared ffn 8192" in capsys.readouterr().out, "the default layer has a shared expert"
    assert cli.main(["sim", *SMALL, "--policy", "my.py,bulk", "--set", "tile_m=64", "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["policy"], row["knobs"]["tile_m"]) for row in rows] == [("my.py", 64), ("bulk", 64)]
    assert cli.main(["explain", *SMALL, "--policy", "my.py"]) == 0
    assert capsys.readouterr().out.startswith("my.py, simulated on 4xH100")


def test_a_new_policy_overwrites_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").write_text("mine")
    for name, why in (("my.py", "cannot write 'my.py': File exists"), ("my.txt", "must end with .py, got 'my.txt'")):
        assert cli.main(["sim", "--new-policy", name]) == 2
        assert capsys.readouterr().err == f"flashmoe sim: error: argument --new-policy: {why}\n"
    assert (tmp_path / "my.py").read_text() == "mine"


@pytest.mark.parametrize("command", ["sim", "explain"])
def test_commands_tell_in_one_line_what_is_wrong_with_a_file(tmp_path, capsys, command):
    path = tmp_path / "bad.py"
    path.write_text(f"{KNOBS}def build(world, knobs):\n    return None")
    assert cli.main([command, *SMALL, "--policy", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"flashmoe {command}: error: policy {path}: build of policy") and err.count("\n") == 1
    path.write_text("1 / 0")
    assert cli.main([command, *SMALL, "--policy", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(
        f"flashmoe {command}: error: argument --policy: policy file {path}, line 1: cannot be imported"
    )


CIRCLE = """
from sim.drafting.draft import Draft
def build(world, knobs):
    draft = Draft(world, knobs, "mine", 4)
    begun, gated = draft.begin(), draft.idle()
    draft.builder.edge(begun, gated)
    draft.builder.edge(gated, begun)
    return draft.builder.build()
"""


def test_a_schedule_that_can_never_end_is_told(tmp_path, capsys):
    path = tmp_path / "circle.py"
    path.write_text(KNOBS + CIRCLE)
    assert cli.main(["sim", *SMALL, "--policy", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"flashmoe sim: error: policy {path}: ") and "rank 0" in err


GRID = """
schema = 1
[grid]
policy = ["my.py", "flashmoe"]
hardware = ["2xH100"]
preset = ["laptop-tiny"]
tokens = [16, 32]
[knobs]
"my.py" = [{}, {tile_m = 64}]
"""


def test_a_grid_has_policies_of_ones_own_in_several_processes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").write_text(TEMPLATE.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "grid.toml").write_text(GRID)
    assert cli.main(["sweep", "grid.toml", "--out", "rows.jsonl", "--jobs", "2"]) == 0
    assert capsys.readouterr().out.startswith("6 simulated rows of the grid are in rows.jsonl, 6 of them new\n")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert sorted((row["policy"], len(row["knobs"]), row["tokens"]) for row in rows if "report" in row) == [
        ("flashmoe", 0, 16), ("flashmoe", 0, 32), ("my.py", 0, 16), ("my.py", 0, 32), ("my.py", 1, 16), ("my.py", 1, 32)
    ]  # fmt: skip
