"""Failing runs become small ones with the same finding, which a file replays in another process."""

import json
import shlex

import pytest
from children import run_python
from small_worlds import flashmoe, spec

from flashmoe_numba.commands.failures import shrink
from flashmoe_numba.explore.choose.schedules import Choice
from flashmoe_numba.explore.run.reports import Report, Site, finding
from flashmoe_numba.explore.run.spec import GivenCall, WorldSpec
from flashmoe_numba.explore.search import Explorer, Search, watched_kernel
from flashmoe_numba.explore.tell.cases import KEYS, Case, load, save
from flashmoe_numba.explore.tell.shrink import Shrinker, smaller

FEW = 3


def size(spec):
    c = spec.config
    return c.num_ranks * spec.num_processors, c.num_experts * c.num_topk, c.num_tokens * c.hidden * c.ffn, spec.epochs


@pytest.mark.parametrize(
    ("plant", "kind", "num_ranks", "wanted"),
    [
        ("gemm1-early", "poison", 1, dict(num_processors=2, epochs=1)),
        ("last-finisher-late", "deadlock", 1, dict(num_processors=1, epochs=1)),
        ("epoch-not-compared", "race", 2, dict(num_processors=1, epochs=3)),
        ("first-experts-weights", "wrong result", 1, dict(num_processors=1, epochs=1)),
    ],
)
def test_a_planted_bug_becomes_small_and_is_replayed(tmp_path, capsys, plant, kind, num_ranks, wanted):
    search, file = Search(spec=spec(epochs=3), plant=plant), tmp_path / "case.json"
    with watched_kernel(plant) as kernel:
        explorer = Explorer(search, kernel)
        bad = next(outcome for outcome in map(explorer.run, range(20)) if outcome.reports)
    assert bad.reports[0].kind == kind
    shrunk = shrink(search, bad, str(file))
    assert shrunk.complete
    assert len(shrunk.case.schedule) <= FEW, f"{shrunk.case.schedule}"
    assert all(now <= before for now, before in zip(size(shrunk.case.spec), size(search.spec), strict=True))
    assert (shrunk.case.spec.config.num_ranks, shrunk.case.spec.config.num_topk) == (num_ranks, 1)
    assert {name: getattr(shrunk.case.spec, name) for name in wanted} == wanted
    assert finding(shrunk.story.reports[0]) == finding(bad.reports[0])

    status, out, err = flashmoe(capsys, "--replay", str(file), "--json", "-")
    assert (status, err) == (1, "")
    found = json.loads(out)
    assert [(report["kind"], report["text"]) for report in found["reports"]] == [
        (report.kind, report.text) for report in shrunk.story.reports
    ]
    assert found["reports"][0]["text"] in shrunk.case.report
    assert found["history"] == json.loads(json.dumps([line._asdict() for line in shrunk.story.lines]))


def shrinker(plant, most_runs, told=lambda runs, best: None):
    with watched_kernel(plant) as kernel:
        explorer = Explorer(Search(spec=spec(), plant=plant), kernel)
        shrinking = Shrinker(kernel, plant, explorer.run(0).reports[0], most_runs, told)
        case = shrinking.shrink(explorer.world, explorer.strategy(0), explorer.late_seed(0))
    return shrinking, case


def test_a_budget_gives_the_best_so_far_and_the_same_each_time():
    first, case = shrinker("gemm1-early", 10)
    assert (first.runs, first.complete) == (10, False)
    assert case.spec.epochs == 1
    assert case.spec.config.num_tokens == 4
    assert shrinker("gemm1-early", 10)[1] == case


def test_ctrl_c_gives_the_best_so_far():
    def interrupt(runs, best):
        if runs == 10:
            raise KeyboardInterrupt

    stopped, case = shrinker("gemm1-early", 100, interrupt)
    assert not stopped.complete
    assert case == shrinker("gemm1-early", 10)[1]


def test_loads_are_late_where_it_takes_that():
    plant, sizes = "packets-counted-by-lanes", dict(num_ranks=1, num_experts=2, num_topk=1, hidden=2, ffn=1)
    search = Search(spec=spec(**sizes, num_tokens=1, num_processors=1, lanes=2, epochs=1), plant=plant)
    with watched_kernel(plant) as kernel:
        explorer = Explorer(search, kernel)
        bad = next(outcome for outcome in map(explorer.run, range(50)) if outcome.reports)
        shrinking = Shrinker(kernel, plant, bad.reports[0])
        case = shrinking.shrink(explorer.world, explorer.strategy(bad.seed), explorer.late_seed(bad.seed))
    assert case.late_seed is not None
    assert (case.spec.config.hidden, case.spec.lanes) == (1, 2)


def test_another_finding_does_not_do():
    plant = "two-writers"
    with watched_kernel(plant) as kernel:
        explorer = Explorer(Search(spec=spec(num_processors=1, epochs=1), plant=plant), kernel)
        reports = explorer.run(0).reports
        poison = next(report for report in reports if report.kind == "poison")
        assert reports[0].kind != "poison"
        case = Shrinker(kernel, plant, poison).shrink(explorer.world, explorer.strategy(0), None)
    assert case.report.startswith("poison: ")
    assert case.spec.config.num_ranks == 2


def test_a_run_without_the_report_is_not_shrunk():
    with watched_kernel(None) as kernel:
        explorer = Explorer(Search(spec=spec(num_processors=1, epochs=1)), kernel)
        with pytest.raises(ValueError, match="does not give its report again"):
            Shrinker(kernel, None, Report("race", "")).shrink(explorer.world, explorer.strategy(0), None)


def test_reports_of_worlds_of_any_size_are_the_same_finding():
    def race(rank, i, *places):
        return Report("race", f"{i}", (f"rank {rank} received.hidden", i), tuple(Site("x", i, p) for p in places))

    assert finding(race(0, 3, "gemm0:1", "gemm1:2")) == finding(race(1, 0, "gemm1:2", "gemm0:1"))
    assert finding(race(0, 3, "gemm0:1", "gemm1:2")) != finding(race(0, 3, "gemm0:1", "gemm1:3"))
    assert finding(Report("race", "", ("rank 0 box of block 3", 0))) == finding(
        Report("race", "", ("rank 2 box of block 0", 1))
    )
    assert finding(Report("error", "IndexError: 3")) != finding(Report("error", "ValueError: 3"))


def test_smaller_worlds_are_worlds_with_one_thing_less():
    start = spec(num_ranks=2, capacity=3, epochs=2)
    worlds = list(smaller(start))
    assert [(world.packing, world.config.capacity) for world in worlds[:2]] == [("none", 3), ("sources", None)]
    assert all(sum(a != b for a, b in zip(size(world), size(start), strict=True)) <= 1 for world in worlds)
    assert {world.config.num_experts for world in worlds} == {2, 4}  # 1 and 3 are not of two ranks, or too few
    given = WorldSpec(config=start.config, epochs=2, given=(GivenCall((4, 4)), GivenCall((0, 1))))
    assert next(world for world in smaller(given) if world.epochs == 1).given == (GivenCall((4, 4)),)


# ---- files

CASE = Case(
    spec=WorldSpec(
        config=spec().config,
        epochs=1,
        packing="none",
        leavers=(1,),
        given=(GivenCall((1, 0), (((0, 1),), ())),),
    ),
    plant="gemm1-early",
    late_seed=3,
    schedule=(Choice("", 0, "rank 1 host"), Choice("rank 0 OS block", 4, "rank 1 processor 1")),
    report="race: of something",
)


def test_a_file_holds_all_of_a_case(tmp_path):
    save(CASE, tmp_path / "case.json")
    assert load(tmp_path / "case.json") == CASE


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda case: case.update(version=7), "version must be 5, got 7"),
        (lambda case: case.pop("plant"), f"the file must have just these: {', '.join(KEYS)}"),
        (
            lambda case: case.update(plant="no-such"),
            "plant must be one of flashmoe explore --list-plants, got 'no-such'",
        ),
        (lambda case: case.update(plant=[]), "plant must be one of flashmoe explore --list-plants, got []"),
        (lambda case: case.update(late_seed=-1), "late_seed must be an integer >= 0, got -1"),
        (lambda case: case["world"].update(lanes=0), "lanes must be an integer >= 1, got 0"),
        (lambda case: case["world"].update(leavers=[2]), "leavers must be different ranks in [0, 1], got 2"),
        (lambda case: case["world"].update(leavers=[1.0]), "leavers must be an integer >= 0, got 1.0"),
        (lambda case: case["world"].update(given=[{}]), "world: 'counts'"),
        (lambda case: case["world"].update(lost=[[0, 1.0, 0]]), "lost must be an integer >= 0, got 1.0"),
        (
            lambda case: case["world"].update(lost=[[0, 2, 0]], deadline=1000),
            "lost must be in a call in [1, epochs=1], after 0 tasks or more, got call 2, 0 tasks",
        ),
        (lambda case: case["world"].update(program=[0.0]), "program must be an integer >= 0, got 0.0"),
        (lambda case: case["world"].update(astray=[[0, -1]]), "astray must be an integer >= 0, got -1"),
        (
            lambda case: case["world"].update(program=[0, 1], epochs=2, given=[]),
            "program needs save, which is what a forward keeps for its backward",
        ),
        (lambda case: case["world"].update(save="all"), "save must be one of rows+up, rows, nothing; got 'all'"),
        (lambda case: case["world"].update(deadline=9), "deadline must be at least 100 switches, got 9"),
        (lambda case: case["world"].update(packing="all"), "packing must be one of sources, none; got 'all'"),
        (lambda case: case["world"].update(packing=[]), "packing must be one of sources, none; got []"),
        (lambda case: case["world"].update(grid=1), "grid must be true or false, got 1"),
        (lambda case: case["world"].update(epochs=2), "epochs must be the number of given calls, 1, got 2"),
        (lambda case: case["world"]["config"].update(num_topk=9), "num_topk must be in [1, num_experts=4], got 9"),
        (lambda case: case.update(schedule=3), "schedule must be a list of [fiber, point, next fiber], got 3"),
        (
            lambda case: case.update(schedule=[["", 0, "rank 7 host"]]),
            "schedule: this world has no such fibers: ['', 0, 'rank 7 host']",
        ),
    ],
)
def test_an_edited_file_is_refused(tmp_path, capsys, edit, message):
    file = tmp_path / "case.json"
    save(CASE, file)
    case = json.loads(file.read_text())
    edit(case)
    file.write_text(json.dumps(case))
    assert flashmoe(capsys, "--replay", str(file)) == (
        2, "", f"flashmoe explore: error: argument --replay: {str(file)!r} is no file of --shrink: {message}\n"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "not a flashmoe explore case"),
        ("{", "not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    ],
)
def test_a_foreign_file_is_refused(tmp_path, capsys, text, message):
    file = tmp_path / "case.json"
    file.write_text(text)
    assert flashmoe(capsys, "--replay", str(file))[2].endswith(f"is no file of --shrink: {message}\n")


@pytest.mark.parametrize("flag", [["--ranks", "2"], ["--shrink", "x.json"], ["--plant=gemm1-early"], ["--no-gated"]])
def test_a_replay_has_no_other_world(tmp_path, monkeypatch, capsys, flag):
    monkeypatch.chdir(tmp_path)
    status, _, err = flashmoe(capsys, "--replay", "case.json", *flag)
    name = flag[0].partition("=")[0]
    assert status == 2
    assert err.endswith(f"argument --replay: the file says what is run, so {name} must not be given\n")


def test_a_file_that_is_not_there(capsys):
    wanted = "flashmoe explore: error: argument --replay: cannot read 'none.json': No such file or directory\n"
    assert flashmoe(capsys, "--replay", "none.json") == (2, "", wanted)


def test_a_replay_of_what_was_mended_is_clean(tmp_path, capsys):
    file = str(tmp_path / "case.json")
    mended = dict(spec=spec(num_processors=1, epochs=1), plant=None, late_seed=None, schedule=(), report="race: x")
    save(Case(**mended), tmp_path / "case.json")
    status, out, _ = flashmoe(capsys, "--replay", file)
    assert (status, out.splitlines()[1:]) == (0, ["clean: what the file tells of does not come any more: race: x"])


def test_there_is_nothing_to_shrink_in_a_clean_search(tmp_path, capsys):
    file = tmp_path / "case.json"
    status, out, _ = flashmoe(capsys, "--seeds", "2", "--epochs", "1", "--shrink", str(file))
    assert (status, out.splitlines()[-2:]) == (0, ["nothing to shrink", "clean"])
    assert not file.exists()


def test_a_search_shrinks_what_it_finds_and_tells_how_to_replay_it(tmp_path, capsys):
    file = str(tmp_path / "case.json")
    status, out, _ = flashmoe(capsys, "--plant", "last-finisher-late", "--seeds", "1", "--shrink", file)
    lines = out.splitlines()
    assert status == 1
    assert lines[-1] == f"replay: flashmoe explore --replay {file}"
    assert any(line.startswith("shrunk in ") and ": 1 ranks x 1 processors + 1" in line for line in lines)
    assert "still polls result_flag(owner 0, expert 0, m 0) = (call 0, 0 rows)" in lines[-2]
    again = run_python("-m", "flashmoe_numba", *shlex.split(lines[-1])[2:], "--history", "40")
    assert (again.returncode, again.stderr) == (1, "")
    assert again.stdout.splitlines()[-5:] == lines[-6:-1]
    _, brief, _ = flashmoe(capsys, "--replay", file, "--history", "0")
    assert "what happened" not in brief
