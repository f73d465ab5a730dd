"""`flashmoe run --backend cuda` on the stand-in for a GPU, its kernels interpreted on fibers; NumPy for cuBLAS."""

import json

import pytest
from stand_ins import InterpretedGrid, without_gpu

from flashmoe_numba import cli
from flashmoe_numba.bench import measure
from flashmoe_numba.bench.yardstick import make_yardstick
from reference import load_preset, make_plan
from reference.layout import SAVES

pytestmark = pytest.mark.usefixtures("outside_mpirun")
SIZES = ["--hidden", "5", "--ffn", "3", "--experts", "4", "--topk", "2"]
FLAGS = ["run", "--preset", "laptop-tiny", "--backend", "cuda", "--virtual-ranks", "2", "--tokens", "3", *SIZES]


def run(monkeypatch, capsys, *flags, **changes):
    """(exit status, report)"""
    sizes = dict(num_ranks=2, num_tokens=3, hidden=5, ffn=3, num_experts=4, num_topk=2)
    config = load_preset("laptop-tiny", **sizes, **changes)
    monkeypatch.setattr(measure, "make_yardstick", lambda backend, *given: make_yardstick("cpu", *given))
    with without_gpu(monkeypatch, InterpretedGrid(config), multiprocessors=2):
        code = cli.main([*FLAGS, "--iterations", "1", "--json", "-", *flags])
    return code, config, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("save", "dtype"), list(zip(SAVES, ("float64", "bfloat16", "float32"), strict=True)))
def test_backwards_are_timed_and_checked(monkeypatch, capsys, save, dtype):
    code, config, report = run(monkeypatch, capsys, "--backward", "--save", save, "--dtype", dtype, dtype=dtype)
    assert (code, report["failures"], report["bitwise_repeatable"]) == (0, [], True)
    assert (report["backend"], report["transport"], report["save"]) == ("cuda", "virtual", save)
    planned = make_plan(config, save=save).backward.kept_total_bytes
    more = report["backward"]["kept_bytes"] > planned
    assert more == (save != "nothing"), "a GPU has room for all rows that may come to a rank, where it keeps rows"
    assert report["backward"]["error_shares"].keys() >= {"x", "topk_weights", "logits", "up_proj", "down_proj"}
    assert all(0 < share <= 1 for share in report["backward"]["error_shares"].values())


def test_a_layer_without_backwards(monkeypatch, capsys):
    code, _, report = run(monkeypatch, capsys)
    assert (code, report["failures"], report["backward"]) == (0, [], None)
