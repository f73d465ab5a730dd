"""The matrix of experiments/32_clean_worlds.py: it has the worlds it should have, and can be stopped at any time."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from reference import make_packets, route
from reference.runs import packet_tile_height

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def matrix(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    return importlib.reload(importlib.import_module("32_clean_worlds"))


def run(matrix, monkeypatch, capsys, *flags):
    monkeypatch.setattr(sys, "argv", ["32_clean_worlds.py", *map(str, flags)])
    return matrix.main(), capsys.readouterr().out.splitlines()


def specs(matrix):
    return {world: matrix.search_of(flags).spec for world, flags in matrix.WORLDS.items()}


def test_every_size_is_there(matrix):
    found = specs(matrix).values()
    assert len(found) >= 12
    assert {spec.packing for spec in found} == {"sources", "none"}
    assert {spec.config.num_ranks for spec in found} == {1, 2, 3, 4}
    assert {spec.num_processors for spec in found} == {1, 2, 3}
    assert {spec.lanes for spec in found} == {1, 2, 3}
    assert {spec.epochs for spec in found} == {1, 2, 3, 4, 5, 6}
    assert {spec.config.num_topk for spec in found} == {1, 2, 3, 4, 6}
    assert {spec.config.token_block for spec in found} == {1, 2, 3}
    assert {spec.config.dtype for spec in found} == {"float32", "float64", "float16", "bfloat16"}
    assert {spec.config.gated for spec in found} == {False, True}
    assert {len(spec.leavers) for spec in found} == {0, 1, 3, 4}
    assert sum(spec.deadline is not None for spec in found) >= 4
    assert {lost.tasks > 0 for spec in found for lost in spec.lost} == {False, True}
    assert any(spec.ties for spec in found) and any(spec.grid for spec in found)
    assert any(spec.config.num_topk == spec.config.num_experts > 1 for spec in found)
    assert any(spec.config.num_ranks == spec.config.num_experts > 1 for spec in found)
    assert any(spec.config.num_experts_per_rank % spec.lanes and spec.lanes > 1 for spec in found)
    assert sum(matrix.SHARES.values()) == 100
    assert max(matrix.SHARES.values()) > 50


def test_worlds_are_what_their_names_say(matrix):
    found = specs(matrix)
    drops = found["drops"]
    assert any(packets.dropped for packets in packets_of(drops)), "of later calls, whose routing is from outside"
    tall = found["tall packets"]
    heights = {packet_tile_height(rows, tall.config) for packets in packets_of(tall) for rows in packets.sent}
    assert heights >= {tall.config.tile_m_min, tall.config.tile_m}
    assert any(rows > tall.config.tile_m for packets in packets_of(tall) for rows in packets.sent)
    best = np.concatenate([routing.topk_idx[:, 0] for routing in drops.calls()[2][1]])
    assert len(np.unique(best[best >= 0])) == 1, "all tokens of a call go to one expert"
    counts = [[len(part) for part in x] for x, _ in found["far ahead"].calls()[1:]]
    assert any(0 in count and any(count) for count in counts)
    twins = found["alone"].weights().router
    np.testing.assert_array_equal(twins[1::2], twins[::2])


def packets_of(spec):
    """Of all ranks in all calls, routed by the reference where the gate does it."""
    router = spec.weights().router
    for x, routings in spec.calls():
        for part, routing in zip(x, routings, strict=True):
            yield make_packets((routing or route(part, router, spec.config)).topk_idx, spec.config)


def test_a_stopped_matrix_goes_on(matrix, monkeypatch, capsys, tmp_path):
    file = tmp_path / "new" / "rows.jsonl"
    monkeypatch.setattr(matrix, "WORLDS", {world: matrix.WORLDS[world] for world in ("one leaves", "all leave")})
    flags = ["--seeds", 10, "--jobs", 1, "--json", file]
    whole = matrix.explore
    left = iter(range(2 * 10 - 5))  # in the midst of the second world

    def stops(*args):
        for outcome in whole(*args):
            if next(left, None) is None:
                raise KeyboardInterrupt
            yield outcome

    monkeypatch.setattr(matrix, "explore", stops)
    assert run(matrix, monkeypatch, capsys, *flags)[0] == 130
    before = file.read_text().splitlines()
    assert len(before) == 3
    monkeypatch.setattr(matrix, "explore", whole)
    status, out = run(matrix, monkeypatch, capsys, *flags)
    after = file.read_text().splitlines()
    assert (status, out[-1]) == (0, "all 2 worlds are clean")
    assert after[:3] == before
    assert [json.loads(row)["runs"] for row in after] == [7, 2, 1, 7, 2, 1]
    assert run(matrix, monkeypatch, capsys, *flags)[0] == 0
    assert file.read_text().splitlines() == after


def test_a_world_that_is_not_clean_is_replayed_by_its_command(matrix, monkeypatch, capsys, tmp_path):
    from flashmoe_numba.cli import main

    file = tmp_path / "rows.jsonl"
    monkeypatch.setattr(matrix, "WORLDS", {"planted": "--world plain --plant gemm1-early --processors 3"})
    flags = ["--seeds", 10, "--jobs", 1, "--json", file]
    status, out = run(matrix, monkeypatch, capsys, *flags)
    assert (status, "all 1 worlds are clean" in out) == (1, False)
    replay = next(line for line in out if line.startswith("replay: ")).removeprefix("replay: flashmoe ").split()
    assert main([*replay, "--json", "-"]) == 1
    for report in json.loads(capsys.readouterr().out)["reports"]:
        assert any(report["text"] in line for line in out), f"{report} is new"
    assert run(matrix, monkeypatch, capsys, *flags)[0] == 1
    bad = [row for row in map(json.loads, file.read_text().splitlines()) if row["reports"]]
    assert len(bad) >= 2, "what was not clean is run again"
