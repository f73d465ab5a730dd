"""Every preset makes a config; shapes of the real models; what importing the package costs."""

import pytest

from reference import load_preset, make_plan, preset_names, read_preset
from reference.config import expert_capacity

SHAPES = {  # hidden, ffn, num_experts, num_topk
    "mixtral-8x7b": (4096, 14336, 8, 2),
    "qwen3-30b-a3b": (2048, 768, 128, 8),
    "olmoe-1b-7b": (2048, 1024, 64, 8),
    "deepseek-v3": (7168, 2048, 256, 8),
    "llama-4-scout": (5120, 8192, 16, 1),
    "gpt-oss-120b": (2880, 2880, 128, 4),
    "longcat-flash": (6144, 2048, 512, 12),
    "flashmoe-paper": (2048, 2048, 32, 2),
    "laptop-text": (512, 1024, 32, 2),
    "laptop-gemm": (1024, 2048, 16, 2),
    "laptop-tiny": (16, 24, 8, 2),
}


def test_models_with_a_shared_expert_have_it():
    widths = {name: load_preset(name).shared_ffn for name in preset_names()}
    assert {name: ffn for name, ffn in widths.items() if ffn} == {"deepseek-v3": 2048, "llama-4-scout": 8192}


def test_shapes():
    found = {name: load_preset(name) for name in preset_names()}
    assert {n: (c.hidden, c.ffn, c.num_experts, c.num_topk) for n, c in found.items()} == SHAPES


@pytest.mark.parametrize("name", SHAPES)
def test_each_file_is_complete_and_can_be_planned(name):
    text = read_preset(name)
    assert {"description", "source", "layer"} <= set(text)
    assert set(text) <= {"description", "source", "leaves_out", "capacity_factor", "layer", "model"}
    assert text["source"].startswith("https://") or name.startswith("laptop")
    plan, config = make_plan(load_preset(name)), load_preset(name)
    assert plan.num_dropped == 0 and plan.real_rows == config.num_ranks * config.num_tokens * config.num_topk


@pytest.mark.parametrize("sizes", [{}, {"num_tokens": 100}, {"num_experts": 64, "num_topk": 1}])
def test_the_paper_has_the_capacity_of_factor_one(sizes):
    config = load_preset("flashmoe-paper", **sizes)
    assert config.capacity == -(-config.num_tokens // config.num_experts) * config.num_topk
    assert load_preset("flashmoe-paper", capacity=None, **sizes).capacity is None


def test_a_capacity_factor_leaves_at_least_a_row_and_at_most_all():
    config = load_preset("laptop-text", num_tokens=100)  # 2 of 32 experts: 4 tokens each, 8 rows
    assert [expert_capacity(config, factor) for factor in (0.125, 0.5, 1, 1.3, 1e308)] == [1, 4, 8, 10, 100]
    with pytest.raises(ValueError, match=r"capacity_factor must leave a row: 0.1 times 8 rows is 0"):
        expert_capacity(config, 0.1)
    for factor in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="capacity_factor must be positive and finite, got"):
            expert_capacity(config, factor)


def test_overrides():
    config = load_preset("laptop-text", num_ranks=4, dtype="float64")
    assert (config.num_ranks, config.dtype, config.hidden) == (4, "float64", 512)
    with pytest.raises(TypeError, match=r"fields of MoEConfig \(num_ranks, .*\), got num_rank"):
        load_preset("laptop-text", num_rank=4)
    with pytest.raises(ValueError, match=r"num_experts must be a multiple of num_ranks=5"):
        load_preset("laptop-text", num_ranks=5)
    with pytest.raises(ValueError, match=r"preset must be one of deepseek-v3, .*; got 'gpt-5'"):
        load_preset("gpt-5")
