"""Whole models: the same logits up to rounding and the same text as eager, whoever routes."""

import copy

import pytest
import torch
from tiny_models import OWN, generated, make_ids, make_model

from flashmoe_numba.torch import register, replace_moe_blocks

BOUND = 5e-7  # of the largest logit: float32, sums of at most 48 terms
REGISTERED = ["deepseek_v2", "deepseek_v4", "gpt_oss", "lfm2_moe", "mixtral", "nemotron_h", "phimoe", "qwen3_moe"]


def distance(logits, expected):
    return float((logits - expected).abs().max() / expected.abs().max())


def assert_same_model(ours, eager, ids):
    """Off by BOUND, or where that is more by what eager itself is off from the same model in float64."""
    expected = eager(ids).logits
    error = distance(ours(ids).logits, expected)
    if error > BOUND:
        assert error <= distance(expected, copy.deepcopy(eager).double()(ids).logits), error
    assert torch.equal(generated(ours, ids), generated(eager, ids))


@pytest.mark.parametrize("family", REGISTERED)
def test_a_registered_family_speaks_as_eager(family):
    register()
    eager, ids = make_model(family), make_ids()
    ours = copy.deepcopy(eager)
    ours.set_experts_implementation("flashmoe")
    assert_same_model(ours, eager, ids)


@pytest.mark.parametrize("family", OWN)
def test_a_swapped_family_speaks_as_eager(family):
    eager, ids = make_model(family), make_ids()
    ours = copy.deepcopy(eager)
    assert replace_moe_blocks(ours)
    assert_same_model(ours, eager, ids)
    assert ours.state_dict().keys() == eager.state_dict().keys()


@pytest.mark.parametrize("family", OWN)
def test_a_block_computes_rows_alone_as_in_a_batch(family):
    """And its experts are used: with others the comparison of models is not one of models without experts."""
    model = make_model(family)
    block = model.get_submodule(replace_moe_blocks(model)[-1])
    x = torch.randn(3, 19, 48, generator=torch.Generator().manual_seed(3))

    def result(x):
        y = block(x)
        return (y[0] if isinstance(y, tuple) else y).reshape(x.shape)

    whole = result(x)
    for row in range(3):
        assert torch.equal(result(x[row : row + 1]), whole[row : row + 1])
    assert torch.equal(result(x[2:, 18:]), whole[2:, 18:])
    for name, parameter in block.named_parameters():
        if name.endswith(("experts.down_proj", "output_linear.weight", "w2")):
            parameter.zero_()
    assert not torch.allclose(result(x), whole, atol=0.1)
