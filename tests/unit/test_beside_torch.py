"""experiments/04_beside_torch.py: PyTorch's blocks are the same layer, the probe reads what it says, rows are right."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from reference import MoEConfig, Weights, check_routing, make_workload, max_rel_error, moe_layer, tolerance

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _experiments(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")


@pytest.fixture
def beside():
    return importlib.import_module("04_beside_torch")


@pytest.fixture
def torch():
    """On one thread: those of PyTorch wait for each other by spinning, which takes long on a busy machine."""
    module = pytest.importorskip("torch", reason="PyTorch is not installed")
    threads = module.get_num_threads()
    module.set_num_threads(1)
    yield module
    module.set_num_threads(threads)


SIZES = dict(num_ranks=1, num_tokens=13, hidden=40, ffn=24, gated=True, activation="silu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 13])
@pytest.mark.parametrize(("experts", "topk", "renormalize"), [(9, 3, False), (5, 5, True), (4, 1, True)])
def test_blocks_of_pytorch_are_the_layer(torch, dtype, tokens, experts, topk, renormalize):
    from torch_block import TorchBlock, agreement, as_array, as_routing, as_tensor

    config = MoEConfig(**SIZES, num_experts=experts, num_topk=topk, renormalize=renormalize, dtype=dtype)
    weights = Weights.random(config, 3)
    x = make_workload("uniform", config, tokens, 5).x[0]
    block, tensor = TorchBlock(config, weights), as_tensor(x)
    idx, factors = block.route(tensor)
    routing = as_routing(idx, factors)
    assert check_routing(routing, x, weights.router, config) is None
    exact = moe_layer([x], weights, config, topk_idx=[routing.topk_idx], topk_weights=[routing.topk_weights])
    for result in (block.eager(tensor, idx, factors), block.grouped(tensor, idx, factors)):
        assert result.dtype == getattr(torch, dtype)
        assert max_rel_error([as_array(result)], exact) <= agreement(config)


def test_two_results_may_be_further_apart_than_one_from_the_oracle_and_no_more_than_three(torch):
    from torch_block import agreement

    for dtype in ("float32", "bfloat16"):
        config = MoEConfig(**SIZES, num_experts=8, num_topk=8, dtype=dtype)
        assert 1.4 * tolerance(config) < agreement(config) < 3 * tolerance(config)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_probe_reads_every_byte_asked_for_and_goes_on_where_it_ended(threads):
    from memory_probe import BLOCK_BYTES, MemoryProbe

    probe = MemoryProbe(3 * BLOCK_BYTES - 8, threads)
    for num_bytes in (8, BLOCK_BYTES - 8, BLOCK_BYTES, BLOCK_BYTES + 8, 7 * BLOCK_BYTES + 80):
        assert probe.read(num_bytes) == num_bytes // 8
    place = probe._next
    probe._blocks[...] = np.arange(1, 4)[:, None]
    sums = [probe.read(8) for _ in range(4)]
    assert sums == [(place + i) % 3 + 1 for i in range(4)]


def test_ratios_are_to_the_better_block(beside):
    ns = {"ours": [4, 6, 20], "eager": [3, 12, 90], "grouped": [5, 8, 80], "probe": [1, 1, 1]}
    ns = {name: np.array(times, float) for name, times in ns.items()}
    assert beside.ratio(ns, np.median) == 6 / 8
    assert beside.ratio(ns, np.min) == 4 / 3
    assert beside.spread(np.array([1.0, 2, 3, 4, 50])) == {"median": 3, "min": 1, "quartiles": [2, 4]}


def test_rows_of_ranks(monkeypatch):
    import beside_one_rank

    def run(*, ranks, tokens, preset, iterations):
        runs.append((ranks, tokens, preset, iterations))
        slow = {8: 3.0, 1: 2.0}[ranks] * tokens + len(runs)
        share = {8: 0.5, 1: 0.25}[ranks]
        passed = tokens != 32
        counts = dict(padded_row_share=share, row_tiles=20 * ranks, blas_share=2 * share)
        return dict(latency_ms={"median": slow}, passed=passed, **counts)

    runs = []
    monkeypatch.setattr(beside_one_rank, "flashmoe_run", run)
    rows = beside_one_rank.beside_one_rank(8, 7, False)
    assert [row["tokens"] for row in rows] == [8, 32, 256]
    assert runs[:3] == [(8, 8, "laptop-gemm", 7), (1, 64, "laptop-gemm", 7), (8, 32, "laptop-gemm", 7)]
    assert len(runs) == 18
    assert rows[0]["ratio"] == (3 * 8 + 7) / (2 * 64 + 8), "the second of three rounds is the median"
    assert (rows[0]["padded_row_share"], rows[0]["packed"]) == (0.5, 0.25)
    assert (rows[0]["row_tiles"], rows[0]["one_rank_row_tiles"]) == (160, 20)
    assert (rows[0]["blas_share"], rows[0]["one_rank_blas_share"]) == (1.0, 0.5)
    assert [row["ok"] for row in rows] == [True, False, True]


def test_without_pytorch_a_smoke_run_passes_and_another_does_not(beside, monkeypatch, capsys):
    monkeypatch.setattr(beside, "beside_one_rank", lambda *_: [])
    monkeypatch.setattr(beside, "show", lambda *_: None)
    monkeypatch.setattr(beside.importlib.util, "find_spec", lambda _: None)
    for flags, status in ((["--smoke"], 0), ([], 2)):
        monkeypatch.setattr(sys, "argv", ["04_beside_torch.py", *flags])
        with pytest.raises(SystemExit) as left:
            beside.main()
        assert left.value.code == status
        said = capsys.readouterr()
        assert "PyTorch is not installed: pip install 'flashmoe-numba[torch]'" in said.out + said.err
        assert bool(said.err) == bool(status)


def test_layers_that_there_are_not_are_refused(beside, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["04_beside_torch.py", "--layers", "gemm,gpt"])
    with pytest.raises(SystemExit) as left:
        beside.main()
    assert left.value.code == 2
    assert "must be out of gemm, gemm-bf16, qwen3, olmoe; got gpt" in capsys.readouterr().err
