"""The real kernel is clean in many small worlds, runs are replayed, and what goes wrong is told."""

import json
import re
from collections import Counter
from dataclasses import replace

import pytest
from small_worlds import flashmoe, spec

from flashmoe_numba.explore.search import Explorer, Search, explore, watched_kernel
from flashmoe_numba.explore.worlds import WORLDS as NAMED
from flashmoe_numba.kernel.control import ABORT
from flashmoe_numba.processes.pools import process_pool

WORLDS = {
    "one rank": dict(num_ranks=1, lanes=2),
    "one processor": dict(num_processors=1, epochs=3),
    "three lanes": dict(lanes=3, num_processors=1),
    "three processors, three ranks": dict(num_ranks=3, num_experts=6, num_processors=3, num_topk=3),
    "four ranks, few packets with rows": dict(num_ranks=4, num_topk=1, epochs=3),
    "drops": dict(capacity=1, num_topk=3, lanes=2, epochs=3),
    "several tiles a packet": dict(num_tokens=9, num_experts=2, num_processors=3),
    "float16": dict(dtype="float16", renormalize=False),
    "bfloat16": dict(dtype="bfloat16", gated=False),
    "float64": dict(dtype="float64", lanes=4, num_processors=1),
}


@pytest.mark.parametrize("strategy", ["random", "pct", "round-robin"])
@pytest.mark.parametrize("world", WORLDS)
def test_the_kernel_is_clean(world, strategy):
    for data_seed in (0, 1):  # other counts of tokens, and other routing in later calls
        search = Search(spec=spec(**WORLDS[world], data_seed=data_seed), strategy=strategy)
        for outcome in explore(search, range(2 * data_seed, 2 * data_seed + 2)):
            assert outcome.reports == [], f"{search}, seed {outcome.seed}: {outcome.reports}"


@pytest.mark.parametrize("strategy", ["random", "pct", "round-robin"])
def test_all_stop_when_a_host_gives_up(strategy):
    world, stopped = replace(spec(lanes=2, data_seed=1), leavers=(1,)), 0
    with watched_kernel(None) as kernel:
        explorer = Explorer(Search(spec=world, strategy=strategy), kernel)
        for seed in range(20):
            assert explorer.run(seed).reports == [], f"seed {seed}"
            stopped += any(rank.control[ABORT] for rank in explorer.world.ranks)
    assert stopped == 20


@pytest.mark.parametrize("strategy", ["random", "pct", "round-robin"])
def test_ranks_that_give_up_at_once_agree_on_one(strategy):
    world, named = replace(spec(num_ranks=3, num_experts=3, data_seed=1), leavers=(0, 2)), Counter()
    with watched_kernel(None) as kernel:
        explorer = Explorer(Search(spec=world, strategy=strategy), kernel)
        for seed in range(20):
            assert explorer.run(seed).reports == [], f"seed {seed}"
            named.update({int(rank.control[ABORT]) for rank in explorer.world.ranks})
    assert set(named) == {1, 3}, "now the one, now the other"
    assert named.total() == 20, "one in each run"


@pytest.mark.parametrize(
    ("plant", "told"),
    [
        ("culprit-not-agreed", r"blame: rank 0 names rank \d, rank 1 names rank \d, rank 2 names rank \d"),
        ("abort-before-record", r"blame: rank \d names rank \d, whose record is not complete"),
        (
            "record-complete-before-its-fields",
            r"race: rank (\d) segments.control.* rank \1 host after its blocks .*",
        ),
    ],
)
def test_wrong_records_and_abort_words_are_told(plant, told):
    world = replace(spec(num_ranks=3, num_experts=3, num_tokens=2, num_topk=1, epochs=1), leavers=(0, 2))
    found = [f"{report}" for run in explore(Search(spec=world, plant=plant), range(60)) for report in run.reports]
    assert any(re.fullmatch(told, report) for report in found), found


def test_ranks_that_do_not_stop_are_found():
    search = Search(spec=replace(spec(), leavers=(1,)), plant="abort-ignored")
    found = [outcome.reports for outcome in explore(search, range(20))]
    kinds = {report.kind for reports in found for report in reports}
    assert kinds == {"deadlock"}


@pytest.mark.parametrize("strategy", ["random", "pct", "round-robin"])
def test_a_seed_replays_the_history_whatever_ran_before(strategy):
    search = Search(spec=spec(lanes=2), strategy=strategy)
    together, (alone,) = histories(search, range(4)), histories(search, [3])
    assert alone == together[3]
    assert together[2] != together[3]


def histories(search, seeds):
    """Of each seed's run: (who, verb, array, index, value) of every atomic access."""
    heard = []
    with watched_kernel(search.plant) as kernel:
        explorer = Explorer(search, kernel)
        explorer.world.memory.listener = lambda actor, verb, region, i, value: heard[-1].append(
            (actor.name, verb, region.name, i, value)
        )
        for seed in seeds:
            heard.append([])
            assert explorer.run(seed).reports == [], f"{search}, seed {seed}"
    return heard


def test_ranks_are_a_call_apart():
    """A host that has nothing to wait for goes on, while the other rank is still in the call before."""
    search = Search(spec=spec(epochs=3, num_topk=1, num_processors=1, data_seed=2), strategy="pct")
    apart = 0
    for seed, history in enumerate(histories(search, range(20))):
        calls = {0: 0, 1: 0}
        for who, verb, array, i, value in history:
            if verb == "releases" and array.endswith("queue.tasks") and i % 8 == 0:
                calls[int(who.split()[1])] = value
                apart += abs(calls[0] - calls[1]) == 1 and min(calls.values()) > 0
                assert abs(calls[0] - calls[1]) <= 1, f"seed {seed}: {calls}"
    assert apart > 0


def test_calls_of_a_grid_follow_each_other():
    """The next launch begins when all ranks' blocks have left the last one, whose epoch the kernel has counted up."""
    search = Search(spec=replace(NAMED["grid"], epochs=3), strategy="pct")
    for seed, history in enumerate(histories(search, range(4))):
        calls = [value for _, verb, array, i, value in history if array.endswith("queue.tasks") and verb == "releases"]
        assert calls == sorted(calls) and set(calls) == {1, 2, 3}, f"seed {seed}"


def test_seeds_take_worlds_in_turn(capsys):
    status, out, _ = flashmoe(capsys, "--list-worlds")
    assert [line.split("  ")[0] for line in out.splitlines()] == list(NAMED)
    status, out, _ = flashmoe(capsys, "--plant", "tie-to-the-last", "--history", "0")
    assert (status, "\nits world: alone: 1 ranks x 3 processors + 1" in out) == (1, True)
    replay = out.splitlines()[-1].removeprefix("replay: flashmoe explore ").split()
    status, again, _ = flashmoe(capsys, *replay, "--json", "-")
    found = json.loads(again)
    assert (status, found["bad_seed"], found["search"]["spec"]["ties"]) == (1, list(NAMED).index("alone"), True)


def test_flags_change_the_worlds_that_they_fit(capsys):
    status, out, _ = flashmoe(capsys, "--ranks", "3", "--data-seed", "1", "--seeds", "1")
    fitting = [name for name, world in NAMED.items() if world.config.num_experts % 3 == 0]
    assert (status, out.splitlines()[0]) == (0, f"{len(fitting)} worlds: {', '.join(fitting)}; strategy random")


def test_outcomes_of_many_processes_come_in_order():
    search = Search(spec=spec(num_processors=1, epochs=1))
    alone = list(explore(search, range(20)))
    with process_pool(2) as pool:
        spread = list(explore(search, range(20), pool))
    assert [(o.seed, o.switches) for o in spread] == [(o.seed, o.switches) for o in alone]


def test_wrong_bits_are_told():
    with watched_kernel(None) as kernel:
        explorer = Explorer(Search(spec=spec()), kernel)
        assert explorer.run(0).reports == []
        explorer.checker._right[2][1].y.view("u4")[0, 0] ^= 1
        (report,) = explorer.run(1).reports
    assert str(report) == "wrong result: rank 1, call 2: rows [0] have other bits than under another seed"


def test_a_clean_search(capsys):
    status, out, _ = flashmoe(capsys, "--seeds", "3", "--epochs", "1")
    assert status == 0
    assert out.splitlines()[-1] == "clean"
    status, out, _ = flashmoe(capsys, "--seeds", "3", "--epochs", "1", "--json", "-")
    found = json.loads(out)
    assert (status, found["clean"], found["runs"], found["replay"]) == (0, True, 3, None)


@pytest.mark.parametrize("plant", ["no-barrier-before-dispatch-signal", "counters-not-zeroed"])
def test_the_world_without_flags_shows_races_in_a_block_and_counters_used_again(plant, capsys):
    status, out, _ = flashmoe(capsys, "--plant", plant, "--seeds", "8", "--history", "0")
    assert status == 1, out


def test_a_bad_seed_is_replayed_by_its_command(capsys):
    flags = ["--plant", "gemm1-early", "--strategy", "pct", "--processors", "3"]
    status, out, _ = flashmoe(capsys, *flags, "--seeds=8", "--seed", "5", "--jobs", "1", "--history", "3")
    assert status == 1
    assert re.search(r"race: rank \d received.hidden\[\d+\]: .* at gemm\d:\d+ and .* at gemm\d:\d+", out), out
    replay = out.splitlines()[-1].removeprefix("replay: flashmoe explore ").split()
    assert replay[:-4] == flags
    assert replay[-4::2] == ["--seed", "--seeds"]
    status, again, _ = flashmoe(capsys, *replay, "--json", "-")
    found = json.loads(again)
    assert (status, found["bad_seed"], found["runs"]) == (1, int(replay[-3]), 1)
    for report in found["reports"]:
        assert f"  {report['kind']}: {report['text']}" in out, f"{report} is new"


def test_a_deadlock_names_flag_value_and_what_is_wanted(capsys):
    flags = ["--plant", "empty-packet-not-signalled", "--world", "plain", "--topk", "1"]
    flags += ["--seeds", "8", "--history", "0"]
    status, out, _ = flashmoe(capsys, *flags)
    assert status == 1
    assert re.search(
        r"OS block .* at .*: rank \d segments.dispatch_flag\[\d+\] is \(call 0, 0 rows\), wanted call 2", out
    ), out
    told = [line for line in out.splitlines() if "processor" in line and "wait_for_place" in line]
    assert len(told) == 4, out
    for line in told:
        assert re.search(
            r"tasks\[\d+\], the stamp of place \d+, is \d, wanted 2; .*TOTAL, is 0; .*abort word, is 0", line
        ), out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--plant", "none"], "argument --plant: there is no 'none'; see --list-plants"),
        (["--world", "plain", "--ranks", "3"], "--experts must be a multiple of --ranks=3, got 4"),
        (["--world", "plain", "--topk", "5"], "--topk must be in [1, --experts=4], got 5"),
        (["--world", "plain", "--leaver", "2"], "--leaver must be different ranks in [0, 1], got 2"),
        (
            ["--world", "plain", "--leaver", "1", "--leaver", "1"],
            "--leaver must be different ranks in [0, 1], got 1, 1",
        ),
        (["--seeds", "9" * 30], f"argument --seeds: must be at most 1000000, got {'9' * 30}"),
        (["--strategy", "exhaustive", "--jobs", "2"], "argument --jobs: not with --strategy exhaustive"),
        (
            ["--strategy", "exhaustive", "--world", "grid"],
            "argument --world: 'grid': exhaustive search needs grid=False, got True",
        ),
        (["--strategy", "exhaustive", "--weak"], "argument --weak: not with --strategy exhaustive"),
        (
            ["--world", "8"],
            "argument --world: there is no '8'; see --list-worlds; the seed of what a world holds is --data-seed 8",
        ),
        (["--world", "all"], "argument --world: there is no 'all'; see --list-worlds"),
        (["--world", "plain", "--lost", "1"], "--lost needs a --deadline, which ends the others' waits"),
        (["--world", "grid", "--leaver", "1"], "--grid must be without leavers and without a deadline"),
        (["--topk", "7"], "--topk must be in [1, --experts=4], got 7"),
        (["--seeds", "0"], "argument --seeds: must be an integer >= 1, got '0'"),
        (
            ["--world", "plain", "--lanes", "200"],
            "--ranks * (--processors + 1) * lanes must be at most 1000, got 2 * (2 + 1) * 200",
        ),
        (["--epochs", "1001"], "epochs must be at most 1000, got 1001"),
        (["--hidden", "1000000"], "segments and weights must be at most 4,194,304 bytes, got 268,001,024"),
        (
            ["--strategy", "exhaustive", "--lanes", "2"],
            "argument --lanes: must be 1 with --strategy exhaustive, got 2",
        ),
    ],
)
def test_what_cannot_be_explored(capsys, argv, message):
    status, _, err = flashmoe(capsys, *argv)
    assert (status, err) == (2, f"flashmoe explore: error: {message}\n")


def test_the_list_of_plants(capsys):
    from flashmoe_numba.explore.plants import PLANTS

    status, out, _ = flashmoe(capsys, "--list-plants")
    assert (status, [line.split()[0] for line in out.splitlines()]) == (0, list(PLANTS))


def test_a_plant_that_does_not_show_is_not_called_clean_alone(capsys):
    status, out, _ = flashmoe(capsys, "--plant", "abort-ignored", "--world", "plain", "--seeds", "1")
    wanted = "clean: abort-ignored does not show in this world and these runs; another may have what it takes"
    assert (status, out.splitlines()[-1]) == (0, wanted)


ONE_OF_EACH = [
    f"--{flag}={value}" for flag, value in dict(ranks=1, processors=1, tokens=1, experts=2, topk=1, epochs=1).items()
]


def test_all_there_is_in_a_small_world(capsys):
    status, out, _ = flashmoe(capsys, "--strategy=exhaustive", *ONE_OF_EACH)
    assert status == 0
    assert re.search(
        r"^14 interleavings up to the order of independent accesses, all there are; \d+ runs", out, re.MULTILINE
    )
    status, out, _ = flashmoe(capsys, "--strategy=exhaustive", *ONE_OF_EACH, "--seeds", "10", "--json", "-")
    found = json.loads(out)
    assert (status, found["runs"], found["all_made"], found["clean"]) == (0, 10, False, True)


def test_a_bad_run_of_an_exhaustive_search_is_told_and_shrunk(capsys, tmp_path):
    planted = ["--plant", "task-before-its-fields", "--shrink", f"{tmp_path}/case"]
    status, out, _ = flashmoe(capsys, "--strategy=exhaustive", *ONE_OF_EACH, *planted)
    assert status == 1
    assert re.search(r"\nrun \d+ is not clean:\n  race: rank 0 queue.tasks\[\d+\]: ", out), out
    assert "\nshrunk in " in out
    status, again, _ = flashmoe(capsys, "--replay", f"{tmp_path}/case")
    assert status == 1
    assert "race: rank 0 queue.tasks[" in again
