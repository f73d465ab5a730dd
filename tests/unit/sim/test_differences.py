"""Two critical paths side by side, and rows of a path that repeat."""

import re

import pytest
from graphs import graphs
from hypothesis import given

from flashmoe_numba import cli
from sim.engine.graph import GraphBuilder
from sim.engine.kinds import COMBINE, ELEMENTWISE, GEMM0, GEMM1, LAUNCH, PERMUTE
from sim.engine.plain import run
from sim.reading.differences import CAUSES, causes_ns, difference_lines, shares
from sim.reading.explain import explain, folded, lines, merged


def chain(*pieces):
    """A graph of nodes (kind, rank, ns), each after the one before; and its explanation."""
    builder = GraphBuilder()
    nodes = [builder.add(kind, rank, duration_ns=time) for kind, rank, time in pieces]
    builder.edge(nodes[:-1], nodes[1:])
    graph = builder.build()
    return graph, explain(graph, run(graph))


@given(graphs(), graphs())
def test_causes_fill_the_makespans_and_shares_the_difference(one, other):
    times = [run(graph) for graph in (one, other)]
    causes = [causes_ns(graph, explain(graph, time)) for graph, time in zip((one, other), times, strict=True)]
    for found, time in zip(causes, times, strict=True):
        assert tuple(found) == CAUSES
        assert sum(found.values()) == time.makespan_ns
        assert min(found.values()) >= 0
    parts = shares(*causes)
    longer = times[0].makespan_ns - times[1].makespan_ns
    assert sum(parts.values()) == pytest.approx(1 if longer else 0)
    for cause, part in parts.items():
        assert part * longer == pytest.approx((causes[0][cause] - causes[1][cause]) if longer else 0, abs=1e-6)


def test_causes_by_hand():
    """COMBINE waits for 10 ns of a product, and GEMM1 for 4 ns of a copy."""
    builder = GraphBuilder()
    slot, other = builder.add_server("SM slots", 0, 1), builder.add_server("copies", 0, 1)
    builder.add(GEMM0, 0, server=slot, duration_ns=10)
    combine = builder.add(COMBINE, 0, server=slot, duration_ns=3)
    builder.add(PERMUTE, 0, server=other, duration_ns=17)
    last = builder.add(GEMM1, 0, server=other, duration_ns=20)
    builder.edge(combine, last)
    graph = builder.build()
    found = causes_ns(graph, explain(graph, run(graph)))
    assert found == dict.fromkeys(CAUSES, 0) | {
        "waiting behind products": 10, "memory": 3, "waiting behind others": 4, "products": 20
    }  # fmt: skip


def test_the_table_says_which_is_faster_and_by_what():
    one, other = (
        causes_ns(*chain((LAUNCH, 0, 5000), (GEMM0, 0, time), (ELEMENTWISE, 0, 2000))) for time in (10_000, 34_000)
    )
    text = list(difference_lines(("mine", "theirs"), one, other))
    assert text[0].startswith("mine is 24.0 us faster than theirs;")
    rows = {line[:24].strip(): line[24:].split() for line in text[3:]}
    assert rows["products"] == ["10.0", "34.0", "-24.0", "100.0%"]
    assert rows["launch"] == ["5.0", "5.0", "+0.0", "0.0%"]
    assert rows["latency of the layer"] == ["17.0", "41.0", "-24.0", "100.0%"]


def test_equal_latencies_have_no_shares():
    same = causes_ns(*chain((LAUNCH, 0, 5000)))
    assert set(shares(same, same).values()) == {0.0}
    assert any("+0.0" in line and "0.0%" in line for line in difference_lines(("a", "b"), same, same))


def test_rows_that_repeat_in_order_are_one_of_each_with_their_sums():
    step = [(GEMM0, 1, 30), (ELEMENTWISE, 1, 20), (GEMM1, 1, 10)]
    graph, found = chain((LAUNCH, 0, 5), *step * 12, (COMBINE, 0, 7))
    rows = list(folded(graph, found.steps))
    assert [(row.count, row.run_ns, times) for row, times in rows] == [
        (1, 5, 1), (12, 360, 12), (12, 240, 12), (12, 120, 12), (1, 7, 1)
    ]  # fmt: skip
    assert [(row.ready_ns, row.done_ns) for row, _ in rows[1:4]] == [(5, 695), (35, 715), (55, 725)]
    text = [line.split("  ")[-1] for line in lines(graph, found)]
    assert [line for line in text if "rank" in line] == [
        "LAUNCH on rank 0", *(f"{name} on rank 1 x 12" for name in ("GEMM0", "ELEMENTWISE", "GEMM1")),
        "COMBINE on rank 0",
    ]  # fmt: skip


def test_what_is_on_another_rank_is_another_row():
    graph, found = chain(*((kind, rank, 5) for rank in range(3) for kind in (GEMM0, GEMM1)))
    assert [times for _, times in folded(graph, found.steps)] == [1] * 6


@given(graphs())
def test_folding_loses_no_time_and_no_node(graph):
    steps = explain(graph, run(graph)).steps
    rows, all_rows = list(folded(graph, steps)), merged(graph, steps)
    assert sum(times for _, times in rows) == len(all_rows)
    for name in ("count", "slot_ns", "run_ns", "transfer_ns", "latency_ns"):
        assert sum(getattr(row, name) for row, _ in rows) == sum(getattr(row, name) for row in all_rows)


FLAGS = ["explain", "--preset", "laptop-text", "--hardware", "4xH100", "--tokens", "64"]


def test_the_command_says_what_makes_the_difference(capsys):
    assert cli.main([*FLAGS, "--policy", "flashmoe", "--against", "bulk"]) == 0
    out, err = capsys.readouterr()
    assert re.match(r"flashmoe is [\d,.]+ us faster than bulk;", out)
    rows = re.findall(r"^(.{24}) *([\d,.]+) +([\d,.]+) +([-+][\d,.]+) +(-?[\d.]+)%$", out, re.MULTILINE)
    assert [row[0].strip() for row in rows] == [*CAUSES, "latency of the layer"]
    numbers = [[float(cell.replace(",", "")) for cell in row[1:]] for row in rows]
    for column in zip(*numbers, strict=True):
        assert sum(column[:-1]) == pytest.approx(column[-1], abs=0.05 * len(CAUSES))
    assert out.count("critical path, first to last") == 2
    assert "changes that would help" not in out and err == ""


def test_both_policies_are_checked_before_anything_runs(capsys):
    assert cli.main([*FLAGS, "--against", "fastest"]) == 2
    assert capsys.readouterr().err.startswith("flashmoe explain: error: argument --against: policy must be one of")
    assert cli.main([*FLAGS, "--against", "bulk", "--set", "packing=per_source"]) == 2
    assert "no knob 'packing' in bulk" in capsys.readouterr().err
