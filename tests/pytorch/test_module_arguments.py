"""What `MoE` refuses, and in which words."""

import re

import numpy as np
import pytest
import torch
from cases import tiny_config
from tiny_modules import CONFIG, make_module, tokens

from flashmoe_numba import FlashMoE
from flashmoe_numba.torch import MoE, register, replace_moe_blocks
from reference import Weights

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


@pytest.mark.parametrize(
    ("weights", "kind", "words"),
    [
        (dict(router=np.ones((4, 9))), TypeError, r"weights\['router'\] must be a tensor or None, got ndarray"),
        (dict(foo=torch.ones(3)), ValueError, "a name in weights must be one of gate_proj, .*router.*; got 'foo'"),
        (dict(router=torch.ones(4, 9)), ValueError, r"weights must have 'up_proj', got \['router'\]"),
        ({}, ValueError, r"weights must have 'router', got \[\]"),
    ],
)
def test_refuses_weights_by_name(weights, kind, words):
    with pytest.raises(kind, match=words):
        MoE(CONFIG, weights)


@pytest.mark.parametrize(("name", "shape"), [("router", (9, 4)), ("up_proj", (4, 9, 6)), ("down_proj", (4 * 9 * 6,))])
@pytest.mark.parametrize("train", [False, True])
def test_refuses_a_parameter_in_another_order(name, shape, train):
    """As many numbers as it should have would be read as if they were in the right one."""
    module = make_module(train=train)
    right = module.get_parameter(name)
    assert right.numel() == torch.Size(shape).numel()
    module.register_parameter(name, torch.nn.Parameter(torch.ones(shape), requires_grad=train))
    with pytest.raises(ValueError, match=rf"{name} must have shape {re.escape(str(list(right.shape)))}, got"):
        module(tokens())


def test_refuses_arguments_of_other_types():
    with pytest.raises(TypeError, match="hidden_states must be a tensor, got ndarray"):
        make_module()(tokens().numpy())
    with pytest.raises(TypeError, match="topk_idx must be a tensor, got list"):
        make_module()(tokens(), [[0, 1]])
    with pytest.raises(TypeError, match="config must be a MoEConfig, got dict"):
        MoE(vars(CONFIG), Weights.random(CONFIG))
    with pytest.raises(TypeError, match="model must be a module of PyTorch, got NoneType"):
        replace_moe_blocks(None)
    with pytest.raises(TypeError, match="name must be a text, got 3"):
        register(3)


def test_a_layer_refuses_weights_of_other_types():
    weights = Weights.random(CONFIG)
    with FlashMoE(CONFIG, weights) as layer:
        for call in (layer.load, layer.pack):
            with pytest.raises(TypeError, match="weights must be Weights, got NoneType"):
                call(None)
        with pytest.raises(ValueError, match=r"weights must be what pack\(\) .* got Weights: layer.pack\(weights\)\?$"):
            layer([tokens().numpy()], weights=weights)


@pytest.mark.parametrize("change", ["half", "double", "bfloat16", "cpu", "float"])
def test_packed_weights_refuse_to_be_moved(change):
    module = make_module(own="packed")
    for whole in (module, torch.nn.Sequential(module)):
        with pytest.raises(TypeError, match="MoE cannot be moved or converted"):
            getattr(whole, change)()
    with pytest.raises(TypeError, match="MoE cannot be moved or converted"):
        module.to(torch.float16)
    assert torch.equal(module(tokens()), make_module()(tokens()))
