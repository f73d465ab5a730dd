"""Figures of a sweep: which are drawn from which rows, and that what is drawn is what the rows say."""

import json
import re
from itertools import pairwise, product
from math import prod

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

from flashmoe_numba import cli
from sim.reading.charts import COLOURS
from sim.studies import figures
from sim.studies.index import write_index
from sim.studies.ties import make_cell, row_error

POLICIES = {"flashmoe": 10.0, "bulk": 30.0, "comet": 20.0}


def row(policy="flashmoe", hardware="2xH100", tokens=128, experts=8, routing="uniform", seed=0, latency=10.0, **more):
    ranks = prod(map(int, hardware.split("x")[:-1]))
    shares = {"tensor_busy": 0.5, "useful": 0.25, "resident": 0.75}
    report = {"latency_us": latency, "tokens_per_s": ranks * tokens / latency * 1e6, **shares}
    sizes = {"hidden": 16, "ffn": 32, "gated": False, "topk": 2, "capacity_factor": None, "precision": "bfloat16"}
    sizes |= {"preset": "laptop-tiny", "experts": experts, "tokens": tokens, "ranks": ranks, "knobs": {}}
    key = json.dumps([policy, hardware, tokens, experts, routing, seed, str(more)])
    return {"key": key, "policy": policy, "hardware": hardware, "routing": routing, "seed": seed, **sizes} | {
        "report": report, **more,
    }  # fmt: skip


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """`draw(rows)` gives the figures by name and the notes; nothing is written."""

    def draw(rows, most=12, **more):
        made = {}
        monkeypatch.setattr(figures, "save", lambda figure, file: made.setdefault(file.name, figure))
        files, notes = figures.draw_figures(rows, tmp_path, most, **more)
        assert [file.name for file in files] == list(made)
        return made, notes

    return draw


def curves_of(axes):
    return {line.get_label(): dict(zip(*line.get_data(), strict=True)) for line in axes.get_lines()}


def test_lines_over_tokens_are_the_rows(drawn):
    rows = [row(p, tokens=t, latency=base * t) for (p, base), t in product(POLICIES.items(), (128, 256, 1024))]
    made, notes = drawn(rows)
    assert list(made) == ["over_tokens.png", "utilisation.png"]
    latency, throughput = made["over_tokens.png"].axes
    assert curves_of(latency) == {p: {t: base * t for t in (128, 256, 1024)} for p, base in POLICIES.items()}
    assert curves_of(throughput)["bulk"] == pytest.approx(dict.fromkeys((128, 256, 1024), 2 / 30))
    assert (latency.get_xlabel(), latency.get_ylabel()) == ("tokens per GPU", "latency, us")
    assert (latency.get_xscale(), latency.get_yscale(), throughput.get_yscale()) == ("log", "log", "linear")
    title = made["over_tokens.png"].get_suptitle()
    assert "simulated on 2xH100" in title
    assert "8 experts, top-2, routing uniform" in title
    assert "no over_experts: it needs several values of experts, and all rows have 8" in notes
    assert len(notes) == 6


def test_latencies_have_bands_as_wide_as_their_errors(drawn):
    rows = [row(p, tokens=t, latency=base * t) for (p, base), t in product(POLICIES.items(), (128, 256, 1024))]
    known = {("flashmoe", 128): 0.2, ("flashmoe", 256): 0.1, ("bulk", 1024): 0.5}
    made, _ = drawn(rows, error=lambda one: known.get((one["policy"], one["tokens"])))
    latency, throughput = made["over_tokens.png"].axes
    assert not throughput.collections
    bulk, flashmoe = latency.collections  # of COMET nothing is known
    lines = {line.get_label(): line.get_color() for line in latency.get_lines()}
    for band, name in ((bulk, "bulk"), (flashmoe, "flashmoe")):
        assert to_hex(band.get_facecolor()[0]).upper() == lines[name]
    corners = sorted({(x, round(y, 6)) for path in flashmoe.get_paths() for x, y in path.vertices.tolist()})
    assert corners == [(128, 1024), (128, 1536), (256, 2304), (256, 2816)]
    assert title_of(made["over_tokens.png"]).endswith("; bands: errors at measurements that no fit saw")
    made, _ = drawn(rows)
    assert "bands" not in title_of(made["over_tokens.png"])


def test_what_differs_is_another_figure_and_names_its_file(drawn):
    rows = [row(tokens=t, experts=e, routing=r) for t, e, r in product((1, 2), (8, 16), ("uniform", "zipf:1.0"))]
    made, notes = drawn(rows)
    assert {name for name in made if name.startswith("over_tokens")} == {
        "over_tokens_E8_uniform.png", "over_tokens_E8_zipf-1.0.png",
        "over_tokens_E16_uniform.png", "over_tokens_E16_zipf-1.0.png",
    }  # fmt: skip
    assert "no fastest_over_experts: it needs several values of policy, and all rows have flashmoe" in notes
    made, notes = drawn(rows, most=1)
    assert sum(name.startswith("over_tokens") for name in made) == 1
    assert "over_tokens: 1 of 4, those with the most rows; choose rows (--where) for others" in notes


def test_what_came_later_is_never_mixed(drawn):
    """Rows of old files have none of it."""
    changes = ({}, {"replicas": 8}, {"rounding": "up"}, {"terms": "schedule"}, {"seeds": 5}, {"layer": 3})
    changes += ({"passes": "training"},)
    made, _ = drawn([row(tokens=tokens, **change) for tokens in (1, 2) for change in changes])
    lines = [name for name in made if name.startswith("over_tokens")]
    assert len(lines) == len(changes) and all(len(curves_of(made[name].axes[0])["flashmoe"]) == 2 for name in lines)
    titles = " ".join(made[name].get_suptitle() for name in lines)
    for words in ("8 replicas", "rows rounded (up)", "terms schedule", "median of 5 seeds", "layer 3", "training"):
        assert titles.count(words) == 1
    assert "terms system" not in titles


def test_rows_that_differ_in_everything_at_once_are_no_figure(drawn):
    made, notes = drawn([row(tokens=1, experts=8), row(tokens=2, experts=16)])
    assert "over_tokens.png" not in made
    assert "no over_tokens: no rows differ in tokens alone" in notes


def test_a_map_has_the_fastest_and_the_ratio_to_the_next(drawn):
    times = {("flashmoe", 1): 10, ("bulk", 1): 15, ("comet", 1): 40, ("flashmoe", 2): 30, ("bulk", 2): 20}
    rows = [row(p, tokens=t, routing=r, latency=v) for (p, t), v in times.items() for r in ("zipf:1.0", "even")]
    rows.append(row("comet", tokens=3, routing="even", latency=1))
    rows.append(row("comet", tokens=3, routing="zipf:1.0", latency=1) | {"error": "no"})
    del rows[-1]["report"]
    made, _ = drawn(rows)
    (axes,) = made["fastest_over_routing.png"].axes
    texts = {tuple(map(round, text.get_position())): text.get_text() for text in axes.texts}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["even", "zipf:1.0"]
    assert texts == {
        (0, 0): "flashmoe\n10 us\n1.50x", (0, 1): "flashmoe\n10 us\n1.50x",
        (1, 0): "bulk\n20 us\n1.50x", (1, 1): "bulk\n20 us\n1.50x", (2, 0): "comet\n1 us\nalone",
    }  # fmt: skip
    title = made["fastest_over_routing.png"].get_suptitle()
    assert "tie" not in title
    assert "?" not in title
    assert len(axes.patches) >= 6, "the cell without a row is drawn too"


def title_of(figure):
    """In one line."""
    return " ".join(figure.get_suptitle().split())


def map_of(drawn, latencies, **more):
    """Texts of the cells of a map by tokens, the colours in them, and its title; `latencies` by (policy, tokens)."""
    rows = [row(p, tokens=t, experts=e, latency=v) for (p, t), v in latencies.items() for e in (8, 16)]
    made, _ = drawn(rows, **more)
    (axes,) = made["fastest_over_experts.png"].axes
    tokens = sorted({tokens for _, tokens in latencies})
    texts = {tokens[round(text.get_position()[0])]: text.get_text() for text in axes.texts}
    colours = {t: [] for t in tokens}
    for patch in axes.patches:
        if patch.get_height() > 0.5 and patch.get_y() < 0.5:
            colours[tokens[round(patch.get_x() + patch.get_width() / 2)]].append(to_hex(patch.get_facecolor()).upper())
    return texts, colours, title_of(made["fastest_over_experts.png"])


def test_a_win_within_the_errors_is_a_tie(drawn):
    latencies = {("bulk", 1): 100, ("comet", 1): 119, ("flashmoe", 1): 125, ("bulk", 2): 100, ("comet", 2): 123}
    texts, colours, title = map_of(drawn, latencies, error=lambda _: 0.1)  # 110 us; 107.1 and 112.5; 110.7 us
    assert texts == {1: "tie\n100 us\n1.19x", 2: "bulk\n100 us\n1.23x"}
    assert colours == {1: [COLOURS[0], COLOURS[1]], 2: [COLOURS[0]]}
    assert title.endswith("tie: not told apart within the simulator's errors")
    texts, _, title = map_of(drawn, latencies)
    assert texts == {1: "bulk\n100 us\n1.19x", 2: "bulk\n100 us\n1.23x"}
    assert "tie" not in title


def test_an_error_that_is_not_known_is_a_doubt(drawn):
    latencies = {("bulk", 1): 100, ("comet", 1): 150, ("bulk", 2): 100, ("flashmoe", 2): 104}
    known = {"bulk": 0.05, "comet": None, "flashmoe": 0.0}
    texts, _, title = map_of(drawn, latencies, error=lambda row: known[row["policy"]])
    assert texts == {1: "bulk\n100 us\n1.50x ?", 2: "tie\n100 us\n1.04x"}
    assert title.endswith("?: its error is not known")
    latencies = {("bulk", 1): 100, ("comet", 1): 150, ("t3", 2): 100, ("comet", 2): 104}
    texts, _, _ = map_of(drawn, latencies, error=lambda row: 0.05 if row["policy"] == "bulk" else None)
    assert texts[2] == "t3\n100 us\n1.04x ?", "one of which nothing at all is known, beside one of which it is"


@pytest.mark.parametrize("errors", [(0.1, 0.1), (0.0, 0.19), (0.25, 0.0), (0.0, 0.0), (None, 0.3), (0.3, None)])
def test_ties_are_symmetric_intervals(errors):
    """Two latencies are a tie if the intervals of their errors overlap, by sampling them."""
    times = (100.0, 122.0)
    spans = [np.linspace(t * (1 - (e or 0)), t * (1 + (e or 0)), 2001) for t, e in zip(times, errors, strict=True)]
    overlap = spans[0].max() > spans[1].min()
    cell = make_cell({name: pair for name, *pair in zip("ab", times, errors, strict=True)})
    assert cell.lines == (("a", "b") if overlap else ("a",))
    assert cell.known == (None not in errors)
    assert make_cell({"a": (1.0, None), "b": (2.0, None)}, judged=False).known


def test_rows_say_their_errors_themselves():
    some = row()
    assert row_error(some) is None
    assert row_error(some | {"left_out_error": 0.07}) == 0.07
    assert row_error(some | {"left_out_error": "no measurement"}) is None
    some["report"]["left_out_error"] = 0.2
    assert row_error(some) == 0.2


def test_lines_of_one_policy_have_letters_in_maps(drawn):
    rows = [
        row(tokens=t, experts=e, knobs={"rate": 0.6, "packing": p}, latency=v)
        for t, e in product((1, 2), (8, 16))
        for p, v in (("arrived", 10), ("per_source", 20))
    ]
    rows += [row("bulk", tokens=t, experts=e, knobs={"rate": 0.6}, latency=30) for t, e in product((1, 2), (8, 16))]
    made, _ = drawn(rows)
    figure = made["fastest_over_experts.png"]
    assert {text.get_text() for text in figure.axes[0].texts} == {"flashmoe A\n10 us\n2.00x"}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["flashmoe A: packing=arrived"]
    assert title_of(figure).endswith("all with rate=0.6")
    names = [text.get_text() for text in made["over_tokens_E8.png"].legends[0].get_texts()]
    assert names == ["bulk", "flashmoe, packing=arrived", "flashmoe, packing=per_source"]


def test_overlap_efficiency_is_that_of_two_gpus(drawn):
    machines = {"1xH100": 9, "2xH100": 10, "8xH100": 16, "2x8xH100": 40}
    rows = [
        row(hardware=h, latency=v, experts=4 * n) for (h, v), n in zip(machines.items(), (1, 2, 8, 16), strict=True)
    ]
    made, _ = drawn(rows)
    _, _, efficiency = made["weak_scaling.png"].axes
    assert curves_of(efficiency) == {"flashmoe": {1: 10 / 9, 2: 1, 8: 10 / 16, 16: 10 / 40}}
    assert "simulated on H100 GPUs" in made["weak_scaling.png"].get_suptitle()
    assert "4 experts per GPU" in made["weak_scaling.png"].get_suptitle()
    assert not any(name.startswith("over_gpus") for name in made), "the experts over all GPUs differ"
    without_two, _ = drawn([some for some in rows if some["ranks"] != 2])
    assert len(without_two["weak_scaling.png"].axes) == 2


def test_of_machines_with_as_many_gpus_the_one_with_fewer_nodes_counts(drawn):
    machines = {"2xH100": 10, "4xH100": 20, "2x2xH100": 99}
    rows = [row(hardware=h, latency=v) for h, v in machines.items()]
    made, _ = drawn(rows)
    assert curves_of(made["over_gpus.png"].axes[0]) == {"flashmoe": {2: 10, 4: 20}}


def test_seeds_are_repeats(drawn):
    rows = [row(tokens=t, seed=s, latency=v) for t in (1, 2) for s, v in enumerate((1, 50, 3))]
    made, _ = drawn(rows)
    assert curves_of(made["over_tokens.png"].axes[0]) == {"flashmoe": {1: 3, 2: 3}}
    assert "median of 3 seeds" in made["over_tokens.png"].get_suptitle()


def test_knobs_make_a_line(drawn):
    rows = [row(tokens=t, knobs=knobs) for t in (1, 2) for knobs in ({}, {"packing": "per_expert", "ladder": True})]
    made, _ = drawn(rows)
    names = ["flashmoe", "flashmoe, ladder=true, packing=per_expert"]
    assert list(curves_of(made["over_tokens.png"].axes[0])) == names


def test_bars_are_shares_at_the_most_tokens(drawn):
    few, many = row(tokens=1), row(tokens=2)
    few["report"] |= {"useful": 0.99}
    made, _ = drawn([few, many])
    (axes,) = made["utilisation.png"].axes
    assert sorted(bar.get_height() for bar in axes.patches) == [25, 50, 75]
    assert "2 tokens per GPU" in made["utilisation.png"].get_suptitle()


def is_inside(axes, label):
    """Matplotlib keeps labels of ticks beyond the ends of an axis, and does not draw them."""
    x, y = label.get_position()
    return all(min(ends) <= at <= max(ends) for at, ends in ((x, axes.get_xlim()), (y, axes.get_ylim())) if at)


def test_nothing_overlaps_in_large_figures(drawn):
    names = [f"policy-{index}" for index in range(12)]
    tokens, experts = [2**i for i in range(4, 16)], [2**i for i in range(3, 10)]
    rows = [
        row(n, "2x8xH100", t, e, latency=t * (i + 1)) for (i, n), t, e in product(enumerate(names), tokens, experts)
    ]
    rows += [some | {"knobs": {"packing": "per_expert", "ladder": True, "tile_m": 64}} for some in rows[:84]]
    made, _ = drawn(rows, most=1)
    assert {name.split("_E")[0].split("_T")[0] for name in made} >= {"over_tokens", "over_experts", "utilisation"}
    for figure in made.values():
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        inside = figure.bbox
        texts = [figure._suptitle, *(axes.xaxis.label for axes in figure.axes)]
        assert all(inside.x0 <= t.get_window_extent().x0 and t.get_window_extent().x1 <= inside.x1 for t in texts)
        for axes in figure.axes:
            for labels in (axes.get_xticklabels(), axes.get_yticklabels(), axes.texts[:12]):
                shown = [label for label in labels if label.get_text() and is_inside(axes, label)]
                boxes = [label.get_window_extent() for label in shown]
                assert not any(one.overlaps(other) for one, other in pairwise(boxes)), figure.get_suptitle()


def write(path, rows):
    path.write_text("".join(json.dumps(some) + "\n" for some in rows), encoding="utf-8")
    return path


def stored(some):
    return {"key": some["key"], **some}


def test_the_command_says_what_it_drew(tmp_path, capsys):
    rows = [stored(row(p, tokens=t, experts=e)) for p, t, e in product(POLICIES, (1, 2), (8, 16))]
    file, out = write(tmp_path / "rows.jsonl", rows), tmp_path / "new" / "figures"
    assert cli.main(["plot", str(file), "--out", str(out), "--where", "experts=8"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == [str(out / name) for name in ("over_tokens.png", "utilisation.png", "index.html")]
    assert "no over_experts: it needs several values of experts, and all rows have 8" in said
    for name in ("over_tokens.png", "utilisation.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_the_index_has_all_figures_and_what_is_not_drawn(tmp_path):
    titles = {tmp_path / "a_E8.png": "Latency\nolmoe, <b>", tmp_path / 'b"c.png': "Fastest"}
    text = write_index(tmp_path / "new", titles, ["no d: it needs <two>"]).read_text()
    assert re.findall(r'<img src="([^"]*)" alt="([^"]*)"', text) == [
        ("a_E8.png", "Latency olmoe, &lt;b&gt;"), ("b&quot;c.png", "Fastest"),
    ]  # fmt: skip
    assert re.findall(r'href="#([^"]*)"', text) == re.findall(r'<figure id="([^"]*)"', text) == ["a_E8", "b&quot;c"]
    assert "<li>no d: it needs &lt;two&gt;</li>" in text
    assert "http" not in text


def test_what_takes_no_time_is_drawn(drawn):
    made, _ = drawn([row(p, tokens=t, latency=1.0) for p in POLICIES for t in (1, 2)])
    zero = [row(p, tokens=t, latency=1.0) for p in POLICIES for t in (1, 2)]
    for one in zero:
        one["report"] |= {"latency_us": 0.0, "tokens_per_s": 0.0}
    assert drawn(zero)[0].keys() == made.keys()


def test_no_rows_no_figures(tmp_path, capsys):
    assert cli.main(["plot", str(write(tmp_path / "rows.jsonl", [])), "--out", str(tmp_path)]) == 1
    assert "no over_tokens: there are no rows with a report" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"report": 3}, {"tokens": None}])
def test_a_line_that_is_no_row_is_named(tmp_path, capsys, change):
    rows = [stored(row()), {name: value for name, value in (stored(row()) | change).items() if value is not None}]
    assert cli.main(["plot", str(write(tmp_path / "rows.jsonl", rows)), "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"flashmoe plot: error: {tmp_path}/rows.jsonl: line 2 is no row of a sweep; if others are, ")
    assert f"delete it (sed -i 2d {tmp_path}/rows.jsonl)" in said and said.count("\n") == 1


@pytest.mark.parametrize(("flags", "message"), [
    (["none.jsonl", "--out", "x"], "none.jsonl: no such file"),
    (["ROWS"], "the following arguments are required: --out"),
    (["ROWS", "--out", "x", "--most", "0"], "argument --most: must be an integer >= 1, got '0'"),
    (["ROWS", "--out", "x", "--error", "100"], "argument --error: must be a number in [0, 100), got '100'"),
    (["ROWS", "--out", "x", "--error", "few"], "argument --error: must be a number in [0, 100), got 'few'"),
    (["ROWS", "--out", "x", "--where", "token=1"], "argument --where: must be KEY=VALUE with a KEY of capacity, "),
    (["ROWS", "--out", "x", "--where", "tokens"], "argument --where: must be KEY=VALUE with a KEY of capacity, "),
    (["ROWS", "--out", "x", "--where", "tokens=7"], "argument --where: no row has tokens=7; tokens is one of 1, 2"),
])  # fmt: skip
def test_bad_flags_are_one_line(tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "rows.jsonl", [stored(row(tokens=tokens)) for tokens in (1, 2)])
    assert cli.main(["plot", *(str(file) if flag == "ROWS" else flag for flag in flags)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"flashmoe plot: error: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "x").exists()
