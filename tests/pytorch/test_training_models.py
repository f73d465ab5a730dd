"""Whole models: gradients of all parameters against eager's, the losses of their routers, and some steps."""

import copy

import pytest
import torch
from tiny_models import make_ids, make_model
from torch.overrides import TorchFunctionMode

from flashmoe_numba.torch import register, replace_moe_blocks

BOUND = 1e-11  # in float64
FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "olmoe")
SHOWN = ("mixtral", "qwen3_moe", "gpt_oss", "olmoe")  # their losses have a part of the router's logits


class InDouble(TorchFunctionMode):
    """Public models make scores and norms in float32, whatever type they have: here they do it in float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        args = [torch.float64 if value is torch.float32 else value for value in args]
        named = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return function(*args, **named)


def loss_of(model, ids):
    shown = dict(output_router_logits=True) if model.config.model_type in SHOWN else {}
    return model(ids, labels=ids, **shown)


def gradients(model, ids):
    model.zero_grad()
    loss = loss_of(model, ids).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_close(found, expected, bound):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] is None) == (value is None), name
        if value is not None:
            assert value.abs().max() > 0, name
            assert (found[name] - value).abs().max() <= bound * value.abs().max(), name


def two_ways(eager):
    """The model with its blocks swapped, and with its experts called by name."""
    swapped, registered = copy.deepcopy(eager), copy.deepcopy(eager)
    replace_moe_blocks(swapped, train=True)
    register(train=True)
    registered.set_experts_implementation("flashmoe")
    return swapped, registered


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_eager(family):
    eager, ids = make_model(family).double().requires_grad_(True), make_ids()
    with InDouble():
        expected = gradients(eager, ids)
        for model in two_ways(eager):
            assert_close(gradients(model, ids), expected, BOUND)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_gradients_in_float32_are_off_by_what_eager_is(family):
    eager, ids = make_model(family).requires_grad_(True), make_ids()
    with InDouble():
        exact = gradients(copy.deepcopy(eager).double(), ids)
    theirs = gradients(eager, ids)
    bound = 4 * max(float((theirs[name] - value).abs().max() / value.abs().max()) for name, value in exact.items())
    for model in two_ways(eager):
        assert_close(gradients(model, ids), exact, bound)


@pytest.mark.parametrize("family", SHOWN)
def test_router_logits_are_shown_with_and_without_gradients(family):
    eager, ids = make_model(family).double(), make_ids()
    swapped = copy.deepcopy(eager)
    replace_moe_blocks(swapped, train=True)
    with InDouble():
        expected = loss_of(eager, ids)
        for _ in range(2):
            found = loss_of(swapped, ids)
            assert len(found.router_logits) == len(expected.router_logits) == 2
            for ours, theirs in zip(found.router_logits, expected.router_logits, strict=True):
                assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
            assert abs(found.aux_loss - expected.aux_loss) < 1e-6  # which transformers sums up in float32
            swapped.requires_grad_(True)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_ten_steps_follow_eager(family):
    eager = make_model(family).requires_grad_(True).train()
    losses = []
    for model in (eager, *two_ways(eager)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses.append([])
        for step in range(10):
            optimizer.zero_grad()
            loss = loss_of(model, make_ids(seed=step % 2)).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(float(loss.detach()))
    assert losses[0][-1] < losses[0][0] - 0.3
    for ours in losses[1:]:
        assert ours == pytest.approx(losses[0], rel=2e-4)


def test_noise_in_training_is_refused():
    model = make_model("phimoe")
    with pytest.raises(
        NotImplementedError, match=r"PhimoeSparseMoeBlock cannot be trained .*noise \(\w*jitter_noise=0.3\)"
    ):
        replace_moe_blocks(model, train=True)
    assert replace_moe_blocks(model)


def test_a_model_for_inference_says_how_it_would_train():
    model = make_model("mixtral").requires_grad_(True)
    replace_moe_blocks(model)
    with pytest.raises(RuntimeError, match="make it with train=True"):
        model(make_ids())
