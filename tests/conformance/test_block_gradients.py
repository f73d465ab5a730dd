"""Gradients of public blocks by PyTorch's autograd, in float64, against those of the layer that we make of the block.

A block's tensors become `Weights` by cutting, turning and stacking; so do their gradients.
"""

import warnings
from dataclasses import fields, replace

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from golden.blocks import EXPERTS, NUM_TOKENS, SCALE, Block
    from golden.make_golden import cases
from golden.tensors import state, tokens

from flashmoe_numba import FlashMoE
from flashmoe_numba.checkpoints import from_state_dict
from reference import Weights, moe_layer_backward, tolerance
from reference.families import read_family
from reference.families.layer_config import layer_config

EXACT = 1e-11
# Blocks whose routers compute in the type of their tokens; others compute in float32.
ROUTED_IN_FLOAT64 = (
    "cohere2_moe.sigmoid", "dbrx", "dbrx.sum", "deepseek_v4", "deepseek_v4.sigmoid", "deepseek_v4_hash", "gpt_oss",
    "lfm2_moe", "mistral4", "phimoe", "phimoe.jitter",
)  # fmt: skip
ROUTED_IN_FLOAT32 = (
    "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "exaone_moe", "granitemoeshared", "jamba", "kolibri1", "laguna",
    "longcat_flash", "minimax_m2", "mixtral", "mixtral.gelu", "olmoe", "qwen2_moe", "qwen3_moe.relu", "step3p7",
)  # fmt: skip
AFTER = {"laguna": SCALE, "step3p7": SCALE}  # what a block multiplies all results by


class Made:
    """A block, the layer made of it, and the gradients of both."""

    def __init__(self, name):
        self.family, options = cases()[name]
        self.block = Block(read_family(self.family), options)
        self.module = self.block.module.double()
        arrays = state(self.block.shapes, EXPERTS)
        for key, value in self.module.state_dict().items():
            value.copy_(torch.from_numpy(arrays[key]))
        self.config, self.weights = self.layer(arrays)
        hidden = self.block.config.hidden_size
        self.x, self.dy = tokens(NUM_TOKENS, hidden), tokens(NUM_TOKENS, hidden, "dy")

    def layer(self, arrays):
        sizes = dict(num_tokens=NUM_TOKENS, layer=1, dtype="float64")
        return from_state_dict(self.block.model, arrays, family=self.family, **sizes)

    def backward(self, before=None):
        """The gradient of x, and gradients as `Weights`; `before` may change what the experts get."""
        x, experts = torch.from_numpy(self.x).requires_grad_(), self.module.get_submodule("experts")
        hook = experts.register_forward_pre_hook(before or (lambda *_: None), with_kwargs=True)
        more = {"input_ids": torch.arange(NUM_TOKENS)[None] * 3} if self.family == "deepseek_v4_hash" else {}
        y = self.module(x[None], **more)
        y = y[0] if isinstance(y, tuple) else y
        (y.reshape(x.shape) * torch.from_numpy(self.dy)).sum().backward()
        hook.remove()
        found = {name: np.zeros(shape) for name, shape in self.block.shapes.items()}
        found |= {name: p.grad.numpy() for name, p in self.module.named_parameters() if p.grad is not None}
        return np.zeros(x.shape) if x.grad is None else x.grad.numpy(), self.layer(found)[1]

    def given_idx(self):
        """From the table of token ids, where there is one."""
        table = self.module.state_dict().get("gate.tid2eid")
        return None if table is None else table.numpy()[np.arange(NUM_TOKENS) * 3]


def error(found, expected):
    """Relative to the largest; with nothing to compare with, infinite."""
    return np.abs(found - expected).max() / np.abs(expected).max() if expected.any() else np.abs(found).max() / 0.0


def errors(ours, theirs, without=()):
    """Of all arrays, by name; those that have no gradient in the block are named in `without`."""
    arrays = {field.name: getattr(theirs, field.name) for field in fields(theirs)}
    named = {name: value for name, value in arrays.items() if isinstance(value, np.ndarray) and name not in without}
    return {name: error(getattr(ours, name), value) for name, value in named.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*ROUTED_IN_FLOAT64, *ROUTED_IN_FLOAT32])
def test_gradients_with_the_routing_of_the_block(name):
    """What experts get is cut off from what made it, so that rows and weights have gradients of their own."""
    made, leaves = Made(name), []
    after = AFTER.get(made.family, 1.0)

    def cut(module, args, kwargs):
        rows, idx, factors = [*args, *kwargs.values()][:3]
        leaves.extend([rows.detach().requires_grad_(), idx, factors.detach().double().requires_grad_()])
        return tuple(leaves), {}

    dx, weights = made.backward(cut)
    rows, idx, factors = leaves
    ours = moe_layer_backward(made.x, made.dy, made.weights, made.config, idx.numpy(), factors.detach().numpy() * after)
    routed = ("router", "router_bias", "selection_bias", "expert_scale")
    assert not any(array.any() for array in (getattr(ours.weights, n) for n in routed) if array is not None)
    found = errors(ours.weights, weights, without=routed)
    found |= {"x": error(ours.x, dx + rows.grad.numpy())}
    found |= {"topk_weights": error(ours.topk_weights[0] * after, factors.grad.numpy())}
    assert max(found.values()) <= EXACT, found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*ROUTED_IN_FLOAT64, *ROUTED_IN_FLOAT32, "llama4"])
def test_gradients_end_to_end(name):
    made = Made(name)
    dx, weights = made.backward()
    ours = moe_layer_backward(made.x, made.dy, made.weights, made.config, made.given_idx())
    found = errors(ours.weights, weights, without=("selection_bias",)) | {"x": error(ours.x, dx)}
    exact = name in ROUTED_IN_FLOAT64
    assert max(found.values()) <= (EXACT if exact else tolerance(replace(made.config, dtype="float32"))), found


@pytest.mark.filterwarnings("ignore")
def test_gradients_of_experts_whose_results_have_a_norm(monkeypatch):
    """Of muse_spark's, which compute their norm in float32 whatever they are given: here in float64. Its router sees
    other rows, so the routing is given. By the reference, and by the kernel.
    """
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    family, options = cases()["muse_spark"]
    block = Block(read_family(family), options)
    config = layer_config(block.family, block.model, num_ranks=1, num_tokens=NUM_TOKENS, layer=1, dtype="float64")
    experts, rng = block.module.experts.double(), np.random.default_rng(0)
    for name, value in state(block.shapes, EXPERTS).items():
        if name.startswith("experts."):
            experts.get_parameter(name.removeprefix("experts.")).data.copy_(torch.from_numpy(value))
    x, dy = tokens(NUM_TOKENS, config.hidden), tokens(NUM_TOKENS, config.hidden, "dy")
    idx = np.argsort(rng.random((NUM_TOKENS, config.num_experts)), axis=1)[:, : config.num_topk]
    factors = rng.uniform(0.1, 1, idx.shape)

    leaves = torch.from_numpy(x).requires_grad_(), torch.from_numpy(factors).requires_grad_()
    (experts(leaves[0], torch.from_numpy(idx), leaves[1]) * torch.from_numpy(dy)).sum().backward()
    theirs = norm_weights(config, {name: p.grad.numpy() for name, p in experts.named_parameters()})
    own = {name: p.detach().numpy() for name, p in experts.named_parameters()}
    own["post_expert_norm.weight"] = 1 + own["post_expert_norm.weight"]
    weights = norm_weights(config, own)
    with FlashMoE(config, weights, backend="fibers", save="rows") as layer:
        _, saved = layer.forward([x], topk_idx=[idx], topk_weights=[factors])
        ours = layer.backward(saved, [dy])
    exact = moe_layer_backward([x], [dy], weights, config, [idx], [factors])
    for made, of_weights in ((exact, exact.weights), (ours, ours.weights[0])):
        found = errors(of_weights, theirs, without=("router", "selection_bias"))
        found |= {"x": error(made.x[0], leaves[0].grad.numpy())}
        found |= {"topk_weights": error(made.topk_weights[0], leaves[1].grad.numpy())}
        assert found.keys() >= {"result_scale", "gate_proj"} and max(found.values()) <= EXACT, found


def norm_weights(config, arrays):
    """Of muse_spark's experts, behind a router that is not asked."""
    made = dict(zip(("gate_proj", "up_proj"), np.split(arrays["gate_up_proj"], 2, axis=1), strict=True))
    made |= {"down_proj": arrays["down_proj"], "result_scale": arrays["post_expert_norm.weight"]}
    choices = config.num_choices
    return Weights(router=np.zeros((choices, config.hidden)), selection_bias=np.zeros(choices), **made)


@pytest.mark.filterwarnings("ignore")
def test_a_sparsemixer_in_training_has_the_gradient_of_its_softmax():
    """Where its lots fall on the best expert, its own backward is what autograd makes of the weight."""
    from transformers.models.phimoe.modeling_phimoe import PhimoeMultiplier

    scores = torch.from_numpy(tokens(7, 6, "scores")).requires_grad_()
    gates = torch.softmax(scores, dim=-1)
    best = gates.argmax(dim=-1, keepdim=True)
    weight, dy = gates.gather(-1, best), torch.from_numpy(tokens(7, 1, "dy"))
    (expected,) = torch.autograd.grad((weight * dy).sum(), scores, retain_graph=True)
    trained = PhimoeMultiplier.apply(scores, weight, best, gates, torch.ones_like(weight))
    (found,) = torch.autograd.grad((trained * dy).sum(), scores)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-12)
