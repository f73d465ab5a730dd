"""`flashmoe sim` in this process: errors before anything is simulated, tables, JSON, files."""

import itertools
import json
import re
import tomllib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from children import printed
from floors import ROOT

import sim
from flashmoe_numba import cli
from flashmoe_numba.commands.columns import TABLES
from flashmoe_numba.commands.knobs import knob_types, knobs_from, parse
from flashmoe_numba.errors import UsageError
from reference import load_preset
from sim.policies.outside import TEMPLATE

SMALL = ["sim", "--preset", "laptop-text", "--hardware", "4xH100", "--tokens", "64"]
KEYS = {
    *("policy", "hardware", "tokens", "latency_us", "tokens_per_s", "tensor_busy", "useful", "resident", "idle"),
    *("exposed_communication_us", "nvlink_bytes_max", "nic_bytes_max", "buffer_bytes", "queue_peak", "num_tasks"),
    *("overlap_efficiency", "rate", "rate_fitted", "simulated", "knobs", "preset", "seed", "layer", "routing"),
}


def run_json(capsys, *flags):
    """(exit status, objects) of a simulation whose stdout must be JSON alone."""
    code = cli.main([*SMALL, "--json", "-", *flags])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("flags", "message"), [
    (["--policy", "fastest"], "argument --policy: policy must be one of flashmoe, "),
    (["--policy", "flashmoe,"], "argument --policy: policy must be one of flashmoe, "),
    (["--hardware", "8xV100"], "argument --hardware: hardware must be a GPU kind (A100, B200,"),
    (["--hardware", "none.toml"], "argument --hardware: hardware file none.toml: no such file; good names"),
    (["--hardware", "16xH100"], "argument --hardware: hardware '16xH100': H100 has at least one node and 1 to 8 GPUs"),
    (["--preset", "gpt-5"], "--preset must be one of"),
    (["--model", "gpt-5"], "--preset must be one of"),
    (["--tokens", "64,0"], "argument --tokens: must be an integer >= 1, got '0'"),
    (["--tokens", "64,,3"], "argument --tokens: must be an integer >= 1, got ''"),
    (["--ranks", "3"], "--experts must be a multiple of --ranks=3, got 32"),
    (["--ranks", "8"], "the layer: --ranks must be at most the 4 GPUs of hardware 4xH100, got 8"),
    (["--topk", "33"], "--topk must be in [1, --experts=32], got 33"),
    (["--tokens", "90000000"], "argument --tokens: the rows that a rank sends need 737.3 GB, and 4xH100 has 80 GB"),
    (["--hidden", "200000", "--ffn", "200000"], "the layer: the busiest rank needs 3840.5 GB"),
    (["--routing", "cold"], "argument --routing: name must be one of: even, uniform, zipf:s"),
    (["--routing", "none.npz"], "argument --routing: name is a recorded workload, but there is no file none.npz"),
    (["--layer", "1"], "argument --layer: goes with --model-config, got 1 without"),
    (["--terms", "equal"], "argument --terms: invalid choice: 'equal'"),
    (["--seeds", "0"], "argument --seeds: must be an integer >= 1, got '0'"),
    (["--capacity", "0"], "argument --capacity: must be an integer >= 1, got '0'"),
    (["--capacity-factor", "-1"], "argument --capacity-factor: capacity_factor must be positive and finite, got -1.0"),
    (["--capacity-factor", "0.1"], "argument --capacity-factor: capacity_factor must leave a row: 0.1 times 4"),
    (["--capacity-factor", "1", "--capacity", "2"], "argument --capacity: not allowed with argument --capacity-factor"),
    (["--precision", ""], "argument --precision: precision must be one of bfloat16, "),
    (["--precision", "int8"], "argument --precision: precision must be one of bfloat16, "),
    (["--precision", "fp8", "--hardware", "4xA100"], "the layer: precision fp8 computes in fp8, which 4xA100 has no"),
    (["--replicas", "3"], "argument --replicas: --experts=32 + replicas must be a multiple of --ranks=4, got"),
    (["--replicas", "-1"], "argument --replicas: must be an integer >= 0, got '-1'"),
    (["--round-tokens", "away"], "argument --round-tokens: invalid choice: 'away'"),
    (["--round-tokens", "up", "--policy", "megamoe"], "argument --round-tokens: policy megamoe chooses its row tile"),
    (["--set", "tile_m"], "argument --set: must be KNOB=VALUE, got 'tile_m'"),
    (["--set", "tile_m="], "argument --set: must be KNOB=VALUE, got 'tile_m='"),
    (["--set", "speed=1"], "argument --set: no knob 'speed' in flashmoe; flashmoe has rate, tile_latency_ns, "),
    (["--set", "tile_m=tall"], "argument --set: tile_m must be an integer, got 'tall'"),
    (["--set", "tile_m=0"], "argument --set: tile_m must be at least 1, got 0"),
    (["--set", "rate=1.5"], "argument --set: rate must be in (0, 1], got 1.5"),
    (["--set", "rate=fast"], "argument --set: rate must be a number or none, got 'fast'"),
    (["--set", "ladder=yes"], "argument --set: ladder must be true or false or none, got 'yes'"),
    (["--set", "packing=loose"], "argument --set: packing must be one of arrived, per_source, per_expert; got 'loose'"),
    (["--set", "packing=per_expert", "--policy", "flashmoe,bulk,comet"], "argument --set: no knob 'packing' in bulk, "),
    (["--seed", "-1"], "argument --seed: must be an integer >= 0, got '-1'"),
    (["--overlap", "--topk", "17"], "argument --overlap: of 2 ranks: --topk must be in [1, --experts=16], got 17"),
    (["--overlap", "--routing", "x.npz"], "argument --overlap: needs a routing that is drawn, because 2 "),
    (["--json", "/proc/none/x.json"], "argument --json: cannot write '/proc/none/x.json'"),
    (["--trace", "/"], "argument --trace: cannot write '/'"),
    (["--plot", "-"], "argument --plot: must be a file, got '-'"),
    (["--plot", "a.png", "--tokens", "3,4"], "argument --plot: needs one policy and one --tokens, got 2 combinations"),
    (["--html", "-"], "argument --html: must be a file, got '-'"),
    (["--html", "a", "--json", "a"], "argument --json: must not be the file of --html, got 'a'"),
    (["--trace", "a", "--policy", "flashmoe,bulk"], "argument --trace: needs one policy and one --tokens, got 2 comb"),
    (["--engine", "pure"], "unrecognized arguments: --engine pure"),
    (["--pass", "back"], "argument --pass: invalid choice: 'back'"),
    (["--pass", "training", "--policy", "comet"], "policy comet: passes must be forward with "),
    (["--pass", "backward", "--precision", "fp8"], "the layer: passes must be forward with "),
    (["--pass", "training", "--layers", "all"], "argument --layers: a step that decodes needs --pass forward, got "),
    (["--save", "rows"], "argument --save: goes with --pass backward or training, got --save rows without"),
    (["--set", "save=rows"], "argument --save: goes with --pass backward or training, got --set save=rows without"),
    (["--save", "all", "--pass", "training"], "argument --save: invalid choice: 'all'"),
    (["--save", "rows", "--pass", "training", "--policy", "bulk,sonic"],
     "argument --save: no knob 'save' in bulk, sonic; what their forward keeps is fixed"),
    (["--save", "rows", "--pass", "training", "--set", "save=nothing"],
     "argument --save: is the same as --set save=nothing, got both"),
    (["--pass", "training", "--set", "save=all"], "argument --set: save must be one of rows+up, rows, "),
])  # fmt: skip
def test_bad_flags_are_one_line(capsys, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*SMALL, *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"flashmoe sim: error: {message}")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_json_is_a_list_in_the_given_order(capsys):
    code, rows = run_json(capsys, "--policy", "megamoe,flashmoe", "--tokens", "32,16", "--seed", "5")
    assert code == 0
    assert [(row["policy"], row["tokens"]) for row in rows] == [
        ("megamoe", 32), ("flashmoe", 32), ("megamoe", 16), ("flashmoe", 16)
    ]  # fmt: skip
    for row in rows:
        assert row.keys() >= KEYS
        assert row["simulated"] is True
        assert (row["hardware"], row["ranks"], row["preset"], row["seed"]) == ("4xH100", 4, "laptop-text", 5)
        assert row["resident"] + sum(row["idle"].values()) == pytest.approx(1)


def test_the_page_has_the_rows_of_the_json(capsys, tmp_path):
    code, rows = run_json(capsys, "--policy", "sonic,flashmoe", "--tokens", "32,16", "--html", str(tmp_path / "a.html"))
    text = (tmp_path / "a.html").read_text()
    found = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])["simulations"]
    assert code == 0
    assert [one["row"] for one in found] == rows
    assert [(one["policy"], one["latency_us"]) for one in found] == [
        (row["policy"], row["latency_us"]) for row in rows
    ]  # fmt: skip


def test_json_is_the_report_of_the_library(capsys):
    flags = ["--routing", "zipf:1", "--seed", "3", "--precision", "fp8", "--set", "ladder=true", "--set", "rate=0.25"]
    _, (row,) = run_json(capsys, *flags, "--hidden", "256", "--ranks", "2", "--capacity", "9")
    config = load_preset("laptop-text", num_ranks=2, num_tokens=64, hidden=256, capacity=9)
    world = sim.World(
        config=config,
        hardware=sim.load_hardware("4xH100"),
        routing=sim.make_routing("zipf:1", config, 3),
        precision=sim.precision("fp8"),
    )
    knobs = sim.make_knobs("flashmoe", {"ladder": True, "rate": 0.25})
    expected = asdict(sim.report(sim.simulate("flashmoe", world, knobs)))
    assert {name: row[name] for name in expected} == expected
    about = {name: value for name, value in asdict(config).items() if name not in ("num_tokens", "capacity")}
    assert (row["layer"], row["capacity"]) == (about, 9)


def test_a_default_precision_is_the_layers_type(capsys):
    _, (row,) = run_json(capsys, "--dtype", "float16")
    assert row["precision"] == "float16"


def test_all_policies(capsys):
    code, rows = run_json(capsys, "--policy", "all")
    assert code == 0
    assert [row["policy"] for row in rows] == list(sim.POLICY_NAMES)


def test_rounded_tokens_leave_no_padding(capsys):
    flags = ["--tokens", "1000", "--set", "packing=per_expert", "--set", "tile_m=16", "--set", "gate=false"]
    _, (before,) = run_json(capsys, *flags)
    _, (after,) = run_json(capsys, *flags, "--round-tokens", "up")
    assert before["useful"] < before["tensor_busy"]
    assert after["useful"] == pytest.approx(after["tensor_busy"])
    assert "rounded (up) to 16" in after["routing"]


def test_replicas_relieve_the_busy_rank(capsys):
    flags = ["--routing", "hot", "--tokens", "4096"]
    _, (before,) = run_json(capsys, *flags)
    _, (after,) = run_json(capsys, *flags, "--replicas", "4")
    assert after["latency_us"] < before["latency_us"]
    assert "4 replicas" in after["routing"]


def test_overlap_is_the_time_of_two_ranks_with_as_many_experts_each(capsys):
    _, (four,) = run_json(capsys, "--overlap")
    _, (two,) = run_json(capsys, "--ranks", "2", "--experts", "16")
    assert four["overlap_efficiency"] == pytest.approx(two["latency_us"] / four["latency_us"])
    _, (two,) = run_json(capsys, "--ranks", "2", "--experts", "16", "--overlap")
    assert two["overlap_efficiency"] == 1


def test_overlap_with_replicas(capsys):
    flags = ["--routing", "zipf:1", "--tokens", "2048", "--replicas"]
    _, (four,) = run_json(capsys, "--overlap", *flags, "8")
    _, (two,) = run_json(capsys, "--ranks", "2", "--experts", "16", *flags, "4")
    assert four["overlap_efficiency"] == pytest.approx(two["latency_us"] / four["latency_us"])


@pytest.mark.parametrize("limit", [["--capacity-factor", "1"], ["--capacity", "64"]])
def test_overlap_leaves_as_much_room_in_the_capacity(capsys, limit):
    """An even routing has what it takes, on 4 ranks and on 2: so a limit that drops nothing changes nothing."""
    flags = ["--tokens", "1024", "--routing", "even", "--overlap", "--set", "packing=per_source"]
    _, (without,) = run_json(capsys, *flags)
    _, (limited,) = run_json(capsys, *flags, *limit)
    assert (limited["capacity"], limited["dropped"]) == (64, 0)
    assert limited["overlap_efficiency"] == without["overlap_efficiency"]


# ---- capacities


def test_a_presets_capacity_follows_the_tokens_and_can_be_lifted(capsys):
    flags = ["--preset", "flashmoe-paper", "--tokens", "64,640"]
    _, rows = run_json(capsys, *flags)
    assert [row["capacity"] for row in rows] == [4, 40], "2 choices, 32 experts"
    assert all(row["dropped"] > 0 and row["rows"] + row["dropped"] == 8 * row["tokens"] for row in rows)
    _, rows = run_json(capsys, *flags, "--capacity-factor", "1.5")
    assert [row["capacity"] for row in rows] == [6, 60]
    _, rows = run_json(capsys, *flags, "--capacity", "none")
    assert [(row["capacity"], row["dropped"]) for row in rows] == [(None, 0), (None, 0)]


def test_dropped_rows_stand_in_the_table(capsys):
    assert cli.main([*SMALL, "--routing", "hot", "--topk", "1", "--capacity", "16"]) == 0
    out = capsys.readouterr().out
    names, units, row = out.splitlines()[4:7]
    cells = dict(zip(zip(names.split(), units.split()[:0] or names.split(), strict=True), row.split(), strict=False))
    assert cells["capacity", "capacity"] == "16" and cells["dropped", "dropped"] == "75.0"
    assert "no capacity" not in out
    assert cli.main(SMALL) == 0
    out = capsys.readouterr().out
    assert "no capacity" in out.splitlines()[1] and "dropped" not in out


def test_tokens_that_lost_all_their_experts_are_not_counted(capsys):
    flags = ["--routing", "hot", "--topk", "1", "--capacity", "16"]
    _, (row,) = run_json(capsys, *flags)
    assert (row["tokens"], row["computed_tokens"]) == (64, 4 * 16)
    assert row["tokens_per_s"] == pytest.approx(4 * 16 / row["latency_us"] * 1e6)


def test_rounding_says_what_it_added(capsys):
    flags = ["--tokens", "100", "--set", "packing=per_expert", "--set", "tile_m=16", "--round-tokens", "up"]
    _, (row,) = run_json(capsys, *flags)
    assert row["added"] > 0 and row["rows"] == 4 * 100 * 2 + row["added"] - row["dropped"]
    assert cli.main([*SMALL, *flags]) == 0
    assert " added " in capsys.readouterr().out.splitlines()[4]


# ---- terms, seeds, imbalance


def test_terms_of_schedules_are_the_same_for_all(capsys):
    _, rows = run_json(capsys, "--policy", "all", "--terms", "schedule")
    for row in rows:
        tiles = {name: value for name, value in row["knobs"].items() if name in ("tile_m", "tile_n", "cluster")}
        assert (row["rate"], row["terms"]) == (0.6, "schedule")
        assert tiles.items() <= {"tile_m": 128, "tile_n": 256, "cluster": 1}.items()
    _, rows = run_json(capsys, "--policy", "all")
    assert {row["terms"] for row in rows} == {"system"} and len({row["rate"] for row in rows}) > 3


def test_the_header_says_the_terms_and_what_was_set(capsys):
    assert cli.main([*SMALL, "--policy", "all"]) == 0
    assert capsys.readouterr().out.splitlines()[2].startswith("terms system: each policy's own tiles, and the rate")
    assert cli.main([*SMALL, "--terms", "schedule", "--set", "tile_n=64", "--set", "rate=0.5"]) == 0
    line = "terms schedule: tiles of 128 x 256 and a rate of 0.600 for all; set tile_n=64, rate=0.5"
    assert capsys.readouterr().out.splitlines()[2] == line


def test_what_is_not_the_layers_has_columns_of_its_own(capsys):
    _, rows = run_json(capsys, "--policy", "flashmoe,scmoe,bulk")
    layer, dense, bulk = rows
    assert layer["dense_us"] == bulk["dense_us"] == 0 < dense["dense_us"] < dense["latency_us"]
    assert layer["host_us"] < 10 < 1000 < bulk["host_us"] < bulk["latency_us"]
    assert cli.main([*SMALL, "--policy", "scmoe"]) == 0
    assert capsys.readouterr().out.splitlines()[4].split()[8:10] == ["host", "dense"]
    assert cli.main([*SMALL, "--policy", "bulk"]) == 0
    assert "dense" not in capsys.readouterr().out


def test_measurements_that_no_fit_saw_are_beside_each_latency(capsys, monkeypatch):
    monkeypatch.setattr("sim.drafting.trust.left_out_errors", lambda: {"bulk": {"H100": {"up to 128": 0.165}}})
    _, rows = run_json(capsys, "--policy", "bulk,t3")
    assert [row["left_out_error"] for row in rows] == [0.165, None]
    assert cli.main([*SMALL, "--policy", "bulk,t3"]) == 0
    bulk, other = capsys.readouterr().out.splitlines()[6:8]
    assert bulk.split()[3] == "16.5" and "no measurement" in other
    assert cli.main([*SMALL, "--policy", "bulk", "--terms", "schedule"]) == 0
    assert "error" not in capsys.readouterr().out
    flags = ["explain", *SMALL[1:]]
    for policy, said in (("bulk", " us (measurements that no fit saw: 16.5 % off)"), ("t3", " us (no measurement)")):
        assert cli.main([*flags, "--policy", policy]) == 0
        assert capsys.readouterr().out.splitlines()[0].endswith(said)
    assert cli.main([*flags, "--policy", "t3", "--set", "rate=0.5"]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith(" us")


def test_seeds_give_the_median_and_the_spread(capsys):
    flags = ["--routing", "zipf:1", "--seed", "4"]
    alone = [run_json(capsys, "--routing", "zipf:1", "--seed", str(seed))[1][0] for seed in range(4, 8)]
    _, (row,) = run_json(capsys, *flags, "--seeds", "4")
    latencies = sorted(one["latency_us"] for one in alone)
    assert row["spread"]["seeds"] == [4, 5, 6, 7]
    assert row["spread"]["latency_us"] == {"median": latencies[1], "min": latencies[0], "max": latencies[3]}
    assert row["latency_us"] == latencies[1] < latencies[3], "the lower one of two"
    (median,) = [one for one in alone if one["latency_us"] == latencies[1]]
    assert {name: value for name, value in row.items() if name != "spread"} == {
        name: value for name, value in median.items() if name != "spread"
    }
    assert cli.main([*SMALL, *flags, "--seeds", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "seeds 4 to 7" in lines[1]
    assert lines[6].split()[2:5] == [f"{latencies[place]:,.1f}" for place in (1, 0, 3)]


def test_imbalance_stands_beside_every_result(capsys):
    _, (row,) = run_json(capsys, "--routing", "hot", "--topk", "1")
    assert (row["rank_imbalance"], row["expert_imbalance"]) == (4, 32)
    assert cli.main([*SMALL, "--routing", "hot", "--topk", "1"]) == 0
    names, _, cells = capsys.readouterr().out.splitlines()[4:7]
    assert "by rank by expert" in names and cells.split()[-3:-1] == ["4.00", "32.00"]


def test_the_help_and_the_documentation_say_what_every_column_means(capsys):
    with pytest.raises(SystemExit):
        cli.main(["sim", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    documentation = (ROOT / "docs/simulator.md").read_text(encoding="utf-8")
    for column in itertools.chain(*TABLES):
        head = f"{column.name} {column.unit}".strip()
        assert f"{head} {column.meaning}" in said
        assert f"| {head} | {column.meaning} |" in documentation


def test_a_training_step_of_all_policies_that_have_one(capsys, tmp_path):
    files = ["--html", str(tmp_path / "a.html")]
    code, rows = run_json(capsys, "--policy", "all", "--pass", "training", *files)
    assert code == 0 and [row["policy"] for row in rows] == ["flashmoe", "sonic", "bulk", "deepep"]
    assert {row["passes"] for row in rows} == {"training"}
    text = (tmp_path / "a.html").read_text()
    found = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])["simulations"]
    kinds = {kind for one in found for band in one["lanes"][0]["bands"] for kind in band["parts"]}
    assert {"WEIGHTS", "ROUTER_WEIGHTS"} <= kinds
    _, alone = run_json(capsys, "--policy", "all", "--pass", "backward")
    assert all(one["latency_us"] < both["latency_us"] for one, both in zip(alone, rows, strict=True))


def test_the_header_says_what_is_simulated_beside_a_forward(capsys, tmp_path):
    for passes, words in (
        ("backward", "backward; float32"),
        ("training", "training: forward, backward and the sum of "),
    ):
        assert cli.main([*SMALL, "--pass", passes, "--trace", str(tmp_path / "a.json")]) == 0
        out = capsys.readouterr().out
        assert out.splitlines()[1].startswith(words) and "no fit has seen a backward" in out
        assert '"WEIGHTS"' in (tmp_path / "a.json").read_text()
    assert cli.main(SMALL) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("float32, routing")


def test_what_a_forward_keeps_is_asked_for_by_a_flag(capsys):
    """The same as the knob; of several schedules those have it that have the choice."""
    flags = ["--pass", "training", "--policy", "flashmoe,sonic"]
    kept = {}
    for save in ("rows+up", "rows", "nothing"):
        _, (one, other) = run_json(capsys, *flags, "--save", save)
        _, (same,) = run_json(capsys, "--pass", "training", "--set", f"save={save}")
        assert (one["knobs"]["save"], "save" in other["knobs"]) == (save, False)
        assert one["latency_us"] == same["latency_us"]
        kept[save] = one["latency_us"], other["latency_us"]
    assert len({one for one, _ in kept.values()}) == 3 and len({other for _, other in kept.values()}) == 1
    _, (default, _) = run_json(capsys, *flags)
    assert default["latency_us"] == kept["rows+up"][0]
    assert cli.main([*SMALL, *flags, "--save", "rows"]) == 0
    assert "set save=rows of flashmoe\n" in capsys.readouterr().out


def test_a_win_within_the_errors_is_a_tie(capsys, monkeypatch):
    """With 40 % off each, those within 7 / 3 of the fastest are not told apart; without errors nobody asked."""
    errors = {"flashmoe": {"H100": {"up to 128": 0.4}}, "megamoe": {"H100": {"up to 128": 0.4}}}
    monkeypatch.setattr("sim.drafting.trust.left_out_errors", lambda: errors)
    flags = ["--policy", "flashmoe,megamoe,bulk"]
    _, rows = run_json(capsys, *flags)
    latencies = [row["latency_us"] for row in rows]
    assert min(latencies) in latencies[:2] and max(latencies[:2]) < 7 / 3 * min(latencies) < latencies[2]
    assert [row["over_fastest"] for row in rows] == [latency / min(latencies) for latency in latencies]
    assert [row["tie"] for row in rows] == [True, True, None]
    assert cli.main([*SMALL, *flags]) == 0
    names, units, *lines = capsys.readouterr().out.splitlines()[4:9]
    assert " over " in names and " fastest " in units
    for row, line, end in zip(rows, lines, ("x tie", "x tie", "x ?"), strict=True):
        assert f" {row['over_fastest']:.2f}{end} " in line
    _, rows = run_json(capsys, *flags, "--terms", "schedule")
    assert {row["tie"] for row in rows} == {False}
    _, rows = run_json(capsys, "--tokens", "64,32")
    assert not any("tie" in row for row in rows), "one schedule is compared with nothing"


def test_the_table_says_simulated_and_has_units(capsys):
    assert cli.main([*SMALL, "--policy", "flashmoe,bulk"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("simulated on 4xH100: laptop-text on 4 ranks, hidden ")
    names, units, first, second = out.splitlines()[4:8]
    assert names.split()[:6] == ["policy", "tokens", "latency", "error", "over", "tokens"]
    assert units.split()[:5] == ["/rank", "us", "+-%", "fastest", "M/s"]
    assert first.split()[:2] == ["flashmoe", "64"]
    assert second.split()[:2] == ["bulk", "64"]
    assert len({line.rindex(line.split()[-1]) for line in (first, second)}) == 1
    assert "NIC" not in names
    assert max(map(len, out.splitlines())) <= 120
    assert err == "", "progress is drawn though stderr is no terminal"


def test_the_table_shows_what_goes_between_nodes(capsys):
    assert cli.main([*SMALL, "--hardware", "2x2xH100"]) == 0
    names, units = capsys.readouterr().out.splitlines()[4:6]
    assert names.index("NIC") + 1 == units.rindex("MB")


def test_the_defaults_are_a_model_on_a_node(capsys):
    assert cli.main(["sim"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("simulated on 8xH100: llama-4-scout on 8 ranks, ")
    assert "bfloat16, routing uniform, seed 0" in out


def test_a_rate_that_was_not_fitted_is_marked(capsys, monkeypatch):
    from sim.drafting import rates

    monkeypatch.setattr(rates, "fitted_rates", lambda: {"flashmoe": {"H100": {"rate": 0.5, "schedule_ns": 300}}})
    assert cli.main([*SMALL, "--policy", "flashmoe"]) == 0
    fitted = capsys.readouterr().out
    assert "0.500" in fitted and "*" not in fitted
    assert cli.main([*SMALL, "--policy", "flashmoe,bulk"]) == 0
    out = capsys.readouterr().out
    assert "0.600*" in out and "* not fitted to measurements of this policy on this GPU" in out


def test_list_has_policies_knobs_hardware_and_routings(capsys):
    assert cli.main(["sim", "--list"]) == 0
    out = capsys.readouterr().out
    for text in (*sim.POLICY_NAMES, *sim.hardware_names(), *sim.ROUTING_NAMES, *sim.PRECISIONS):
        assert text in out
    assert "FlashMoE: one persistent kernel per rank" in out
    assert "packing=arrived (arrived|per_source|per_expert)" in out.replace("\n      ", " ")


def test_list_marks_what_is_assumed_and_names_the_source_of_all_else(capsys):
    assert cli.main(["sim", "--list"]) == 0
    values = capsys.readouterr().out.replace("\n      ", " ")
    for name in sim.POLICY_NAMES:
        (line,) = [line for line in values.splitlines() if line.startswith(f"  {name} ")]
        assert cli.main(["sim", "--list", name]) == 0
        said = capsys.readouterr().out.replace("\n      ", " ")
        for knob, value in asdict(sim.make_knobs(name, {})).items():
            (text,) = [text for text in said.splitlines() if text.startswith(f"  {knob} = {value} ")]
            (marked,) = re.findall(rf" {knob}={re.escape(str(value))}(\*?)[, (]", f"{line},")
            assert ("default: assumption" in text) == (marked == "*")
    assert "fitted to published tables" in said and "fitted: 0." in said, "of DeepEP, the last one"


@pytest.mark.parametrize("kind", sim.hardware_names())
def test_list_marks_what_is_assumed_of_a_machine(capsys, kind):
    sources = tomllib.loads((ROOT / f"sim/presets/{kind}.toml").read_text(encoding="utf-8"))["sources"]
    assert cli.main(["sim", "--list"]) == 0
    (line,) = re.findall(rf"^  {kind} (.*)$", capsys.readouterr().out.replace("\n      ", " "), re.MULTILINE)
    marks = {part.partition("=")[0]: part.endswith("*") for part in line.strip().split(", ")}
    assert marks == {name: text.startswith("assumption:") for name, text in sources.items()}
    assert cli.main(["sim", "--list", f"2x4x{kind}"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert all(" ".join(text.split()) in said for text in sources.values())


def test_list_has_policies_and_machines_of_ones_own(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sim", "--new-policy", "my.py"]) == 0
    Path("bare.py").write_text(TEMPLATE.read_text().replace(" Default: assumption: the usual tile of large", ""))
    Path("my.toml").write_text((ROOT / "sim/presets/A100.toml").read_text().replace('"A100"', '"mine"'))
    capsys.readouterr()
    for name, text in (("my.py", "default: assumption: the usual tile"), ("bare.py", "default: not stated")):
        assert cli.main(["sim", "--list", name]) == 0
        assert text in capsys.readouterr().out
    assert cli.main(["sim", "--list", "2xmy.toml"]) == 0
    assert capsys.readouterr().out.startswith("2x8xmine: 2 x 8 GPUs, fitted rates of mine\n  sms = 108\n")
    for name, text in (("model", "bytes that a multiprocessor draws"), ("nvfp4", "weight 0.5625, token 0.5625")):
        assert cli.main(["sim", "--list", name]) == 0
        assert text in capsys.readouterr().out
    wrong = {
        "H999": "must be a policy (flashmoe, ",
        "": "must be a policy (flashmoe, ",
        "no.py": "policy file no.py: no such file",
    }
    wrong |= {"no.toml": "hardware file no.toml: no such file", "99xh100": "hardware '99xh100': H100 has at least"}
    for name, text in wrong.items():
        assert cli.main(["sim", "--list", name]) == 2
        assert capsys.readouterr().err.startswith(f"flashmoe sim: error: argument --list: {text}")


@pytest.mark.parametrize("instead", [["--list"], ["--list", "H100"], ["--new-policy", "my.py"]])
@pytest.mark.parametrize(("flag", "file"), [("json", "-"), ("trace", "a"), ("plot", "a.png"), ("html", "a.html")])
def test_what_makes_no_simulation_writes_none(capsys, monkeypatch, tmp_path, instead, flag, file):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sim", *instead, f"--{flag}", file]) == 2
    expected = f"flashmoe sim: error: argument --{flag}: is of simulations, of which {instead[0]} makes none\n"
    assert capsys.readouterr() == ("", expected) and not list(tmp_path.iterdir())


def test_files_are_written_into_new_folders(capsys, tmp_path):
    files = {flag: tmp_path / "new" / flag for flag in ("json", "trace", "plot")}
    flags = [str(part) for flag, file in files.items() for part in (f"--{flag}", file)]
    assert cli.main([*SMALL, "--set", "packing=per_source", *flags]) == 0
    (row,) = json.loads(files["json"].read_text())
    trace = json.loads(files["trace"].read_text())
    assert trace["otherData"]["note"].startswith("simulated flashmoe on 4xH100")
    slices = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(slices) == row["num_tasks"]
    assert max(event["ts"] + event["dur"] for event in slices) == pytest.approx(row["latency_us"])
    assert files["plot"].read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.startswith("simulated on 4xH100")


def test_a_machine_of_ones_own(capsys, tmp_path):
    hardware = sim.load_hardware("2xH100")
    from sim.world.machine_files import to_toml

    (tmp_path / "mine.toml").write_text(to_toml(hardware).replace('name = "2xH100"', 'name = "mine"', 1))
    _, (row,) = run_json(capsys, "--hardware", str(tmp_path / "mine.toml"))
    assert (row["hardware"], row["ranks"]) == ("mine", 2)


def test_a_recorded_routing(capsys, tmp_path):
    np.savez(tmp_path / "recorded.npz", topk_idx=np.zeros((4 * 64, 1), np.int64))
    _, (row,) = run_json(capsys, "--routing", str(tmp_path / "recorded.npz"), "--topk", "1", "--set", "gate=false")
    assert row["routing"].endswith("recorded.npz")
    assert row["nvlink_bytes_max"] > 0


def test_the_help_says_what_a_file_of_a_routing_may_be(capsys):
    for command in ("sim", "explain"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        said = " ".join(capsys.readouterr().out.split())
        for text in ("[tokens, topk]", "[ranks, tokens, topk]", "[experts]", "[ranks, experts]", "FILE.npz:KEY"):
            assert text in said
        for text in ("-1 and the number of experts are none", "--layer says which", "[layer,][rank,]expert,tokens"):
            assert text in said


def test_a_recording_of_ranks_that_keep_to_themselves_sends_nothing_with_fewer_tokens(capsys, tmp_path):
    own = np.arange(4)[:, None, None] * 8 + np.random.default_rng(0).random((4, 100, 8)).argsort(axis=-1)[..., :2]
    np.savez(tmp_path / "ranks.npz", topk_idx=own)
    _, (row,) = run_json(capsys, "--routing", str(tmp_path / "ranks.npz"))
    assert (row["tokens"], row["nvlink_bytes_max"]) == (64, 0)
    assert row["routing"].endswith("ranks.npz, by rank")


def test_a_layer_of_a_recording(capsys, tmp_path):
    by_layer = np.random.default_rng(0).random((3, 256, 32)).argsort(axis=-1)[..., :2]
    np.savez(tmp_path / "layers.npz", topk_idx=by_layer)
    flags = ["--routing", str(tmp_path / "layers.npz")]
    assert cli.main([*SMALL, *flags]) == 2
    error = capsys.readouterr().err
    assert "must have a leading index of --ranks=4" in error and "(--layer)" in error
    _, (row,) = run_json(capsys, *flags, "--layer", "2")
    assert row["routing"].endswith("layers.npz, layer 2")
    busiest = np.bincount(by_layer[2].ravel(), minlength=32).max()
    assert row["expert_imbalance"] == pytest.approx(busiest / 16)


def test_with_a_model_a_recording_may_be_of_its_layer_alone(capsys, tmp_path):
    model = {"model_type": "deepseek_v3", "hidden_size": 64, "moe_intermediate_size": 32, "n_routed_experts": 8}
    model |= {"num_experts_per_tok": 2, "num_hidden_layers": 4, "first_k_dense_replace": 2, "intermediate_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(model))
    by_layer = np.random.default_rng(0).random((4, 256, 8)).argsort(axis=-1)[..., :2]
    np.save(tmp_path / "one.npy", by_layer[3])
    np.save(tmp_path / "all.npy", by_layer)
    flags = ["sim", "--model-config", str(tmp_path / "config.json"), "--layer", "3", "--hardware", "4xH100"]
    found = []
    for name in ("one.npy", "all.npy"):
        assert cli.main([*flags, "--tokens", "64", "--routing", str(tmp_path / name), "--json", "-"]) == 0
        found += json.loads(capsys.readouterr().out)
    assert found[0]["latency_us"] == found[1]["latency_us"]
    assert [row["routing"].rpartition("/")[2] for row in found] == ["one.npy", "all.npy, layer 3"]


def test_a_histogram(capsys, tmp_path):
    (tmp_path / "load.csv").write_text("expert,tokens\n3,500\n7,1\n")
    _, (row,) = run_json(capsys, "--routing", str(tmp_path / "load.csv"), "--topk", "1")
    assert row["expert_imbalance"] > 25 and row["routing"].endswith("load.csv, histogram")


@pytest.mark.parametrize(("text", "kind", "value"), [
    ("7", int, 7), ("-3", int, -3), ("0.5", float, 0.5), ("1", float, 1.0), ("true", bool, True),
    ("False", bool, False),
    ("word", str, "word"), ("none", int | None, None), ("7", int | None, 7), ("None", float | None, None),
    ("none", str, "none"),
])  # fmt: skip
def test_knobs_are_of_the_type_of_their_annotation(text, kind, value):
    parsed = parse("knob", text, kind)
    assert (parsed, type(parsed)) == (value, type(value))


@pytest.mark.parametrize("policy", sim.POLICY_NAMES)
def test_every_knob_of_every_policy_can_be_set_to_its_default(policy):
    defaults = sim.make_knobs(policy, {})
    pairs = [f"{name}={getattr(defaults, name)}" for name in knob_types(policy)]
    assert knobs_from([policy], pairs) == {policy: defaults}


def test_a_knob_is_set_in_all_policies_and_the_last_value_counts():
    made = knobs_from(["flashmoe", "bulk"], ["tile_m=32", "tile_m=64"])
    assert [knobs.tile_m for knobs in made.values()] == [64, 64]
    with pytest.raises(UsageError, match="no knob 'num_ops' in flashmoe; flashmoe has rate"):
        knobs_from(["bulk", "flashmoe"], ["num_ops=100"])


def test_importing_the_simulator_for_a_notebook_loads_no_numba():
    program = "import sys, sim; sim.load_hardware('8xH100'); print(sorted({'numba', 'matplotlib'} & set(sys.modules)))"
    assert printed("-c", program).strip() == "[]"
    assert all(hasattr(sim, name) for name in sim.__all__)
