"""What `MoE` refuses, and in which words."""

import pytest
import torch
from cases import tiny_config
from tiny_modules import make_module, tokens

ROUTING = torch.arange(2).repeat(6, 1), torch.ones(6, 2)


@pytest.mark.parametrize(
    ("x", "given", "words"),
    [
        ([2, 18], {}, r"hidden_states must have shape \[..., 9\], got \[2, 18\]"),
        ([], {}, r"hidden_states must have shape \[..., 9\], got \[\]"),
        ([3, 9], dict(topk_idx=torch.arange(4).reshape(1, 4)), r"topk_idx must have shape \[..., 2\], got \[1, 4\]"),
        ([6, 9], dict(topk_weights=torch.ones(12)), r"topk_weights must have shape \[..., 2\], got \[12\]"),
        ([6, 9], dict(logits=torch.ones(8, 3)), r"logits must have shape \[..., 4\], got \[8, 3\]"),
        ([8, 9], dict(topk_idx=ROUTING[0], topk_weights=ROUTING[1]), r"topk_idx must have a row for each of 8 tokens"),
        ([5, 9], dict(logits=torch.ones(9, 4)), r"logits must have a row for each of 5 tokens, got shape \[9, 4\]"),
        ([6, 9], dict(topk_weights=ROUTING[1]), "topk_idx must be given where topk_weights is"),
        ([6, 9], dict(topk_idx=ROUTING[0]), "topk_weights must be given where topk_idx is"),
    ],
)
def test_refuses_shapes_that_do_not_fit(x, given, words):
    with pytest.raises(ValueError, match=words):
        make_module()(torch.ones(x), **given)


def test_a_routing_may_have_other_axes_than_the_tokens():
    x, module = tokens(rows=6), make_module()
    y = module(x.reshape(2, 3, 9), ROUTING[0].reshape(3, 2, 2), ROUTING[1])
    assert torch.equal(y.reshape(6, 9), module(x, *ROUTING))


def test_a_capacity_is_that_of_one_call():
    module = make_module(tiny_config(num_ranks=1, capacity=3))
    module(tokens())
    with pytest.raises(ValueError, match=r"capacity must be None for more than num_tokens=7 .* got 3 and 8 tokens"):
        module(torch.ones(8, 9))
