"""The matrix of experiments/32_clean_worlds.py: it has the worlds it should have, and can be stopped at any time."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

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
    assert {spec.config.num_ranks for spec in found} == {2, 3, 4}
    assert {spec.num_processors for spec in found} == {1, 2, 3}
    assert {spec.lanes for spec in found} == {1, 2, 3, 4}
    assert {spec.epochs for spec in found} == {1, 2, 3}
    assert {spec.config.num_topk for spec in found} == {1, 2, 3}
    assert {spec.config.dtype for spec in found} >= {"float32", "bfloat16"}
    assert {len(spec.leavers) for spec in found} == {0, 1, 2}
    assert sum(matrix.SHARES.values()) == 100
    assert max(matrix.SHARES.values()) > 50


def test_worlds_are_what_their_names_say(matrix):
    found = specs(matrix)
    tokens, routings = found["hot expert"].calls()[1]
    chosen = np.concatenate([routing.topk_idx for routing in routings])
    assert len(chosen) == 8, tokens
    assert len(np.unique(chosen)) == 1
    drops = found["drops"]
    _, routings = drops.calls()[1]
    pairs = np.bincount(routings[0].topk_idx.ravel())
    assert pairs.max() > drops.config.capacity
    counts = [[len(part) for part in x] for x, _ in found["ranks without tokens"].calls()[1:]]
    assert [count.index(0) for count in counts] in ([0, 1], [1, 0])


def test_a_stopped_matrix_goes_on(matrix, monkeypatch, capsys, tmp_path):
    file = tmp_path / "new" / "rows.jsonl"
    monkeypatch.setattr(matrix, "WORLDS", {world: matrix.WORLDS[world] for world in ("smallest", "three lanes")})
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
    monkeypatch.setattr(matrix, "WORLDS", {"planted": "--plant gemm1-early --processors 3"})
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
