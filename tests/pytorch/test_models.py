"""Whole models: the same logits up to rounding and the same text as eager, whoever routes."""

import copy

import pytest
import torch
from tiny_models import REGISTERED, SWAPPED, generated, make_ids, make_model

from flashmoe_numba.torch import register, replace_moe_blocks

BOUND = 5e-7  # of the largest logit: float32, sums of at most 48 terms


def assert_same_model(ours, eager, ids):
    expected = eager(ids).logits
    error = float((ours(ids).logits - expected).abs().max() / expected.abs().max())
    assert error <= BOUND, error
    assert torch.equal(generated(ours, ids), generated(eager, ids))


@pytest.mark.parametrize("family", REGISTERED)
def test_a_registered_family_speaks_as_eager(family):
    register()
    eager, ids = make_model(family), make_ids()
    ours = copy.deepcopy(eager)
    ours.set_experts_implementation("flashmoe")
    assert_same_model(ours, eager, ids)


@pytest.mark.parametrize("router", ["kernel", "torch"])
@pytest.mark.parametrize("family", SWAPPED)
def test_a_swapped_family_speaks_as_eager(family, router):
    eager, ids = make_model(family), make_ids()
    ours = copy.deepcopy(eager)
    assert len(replace_moe_blocks(ours, router=router)) == 2
    assert_same_model(ours, eager, ids)
    assert ours.state_dict().keys() == eager.state_dict().keys()


@pytest.mark.parametrize("family", SWAPPED)
def test_the_swapped_blocks_are_used(family):
    """Zeros in the experts' results change the logits: the comparison above is not of models without experts."""
    ours, ids = make_model(family), make_ids()
    replace_moe_blocks(ours)
    before = ours(ids).logits
    for name, parameter in ours.named_parameters():
        if name.endswith(("down_proj", "output_linear.weight", "w2")):
            parameter.zero_()
    assert float((ours(ids).logits - before).abs().max()) > 0.05 * float(before.abs().max())


@pytest.mark.parametrize("family", SWAPPED)
def test_a_block_computes_rows_alone_as_in_a_batch(family):
    model = make_model(family)
    names = replace_moe_blocks(model)
    block = model.get_submodule(names[0])
    if hasattr(block, "shared_expert"):
        block.shared_expert.down_proj.weight.zero_()  # that one is PyTorch's, whose rows depend on the batch
    x = torch.randn(3, 19, 48, generator=torch.Generator().manual_seed(3))
    whole = block(x)
    for row in range(3):
        assert torch.equal(block(x[row : row + 1]), whole[row : row + 1])
    assert torch.equal(block(x[2:, 18:]), whole[2:, 18:])


def test_a_model_without_known_blocks_is_an_error():
    with pytest.raises(ValueError, match=r"model must have a block of a kind that is known .*got Linear"):
        replace_moe_blocks(torch.nn.Linear(3, 3))
    with pytest.raises(ValueError, match="router"):
        replace_moe_blocks(make_model("mixtral"), router="both")
