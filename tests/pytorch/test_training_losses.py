"""Losses of routers: by their formulas, beside transformers' own, and as a module returns them."""

import pytest
import torch
from cases import tiny_config
from tiny_modules import CONFIG, make_module, tokens
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from flashmoe_numba.torch import load_balancing_loss, router_z_loss
from flashmoe_numba.torch.kept_calls import KEPT
from reference import RouterKind


def made(rows=11, n=5, num_topk=2, dtype=torch.float64):
    """(logits, the best choices)."""
    logits = torch.randn(rows, n, dtype=dtype, generator=torch.Generator().manual_seed(2))
    return logits.requires_grad_(), logits.topk(num_topk).indices


def gradient(loss, x):
    return torch.autograd.grad(loss, x)[0]


def test_load_balancing_is_that_of_transformers():
    logits, choices = made(dtype=torch.float32)
    ours, theirs = load_balancing_loss(logits, choices), load_balancing_loss_func((logits,), 5, 2)
    assert torch.allclose(ours, theirs, rtol=1e-6)
    assert torch.allclose(gradient(ours, logits), gradient(theirs, logits), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_load_balancing_by_its_formula(score):
    logits, choices = made()
    logits = logits.detach()
    choices[3, 1] = -1  # no choice
    expected = 0.0
    for expert in range(5):
        chose = sum(expert in row.tolist() for row in choices) / 11
        scores = logits.exp() if score == "softmax" else 1 / (1 + (-logits).exp())
        expected += 5 * chose * float((scores[:, expert] / scores.sum(1)).mean())
    assert float(load_balancing_loss(logits, choices, score)) == pytest.approx(expected, rel=1e-12)
    even = torch.arange(10).reshape(5, 2) % 5
    assert float(load_balancing_loss(logits[:5], even, score)) == pytest.approx(2, rel=1e-12)
    assert float(load_balancing_loss(logits[:0], choices[:0], score)) == 0


def test_router_z_by_its_formula():
    logits, _ = made()
    assert torch.allclose(router_z_loss(logits), (logits.exp().sum(1).log() ** 2).mean(), rtol=1e-12)
    assert float(router_z_loss(logits[:0].detach())) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_many_tokens_in_a_narrow_type(dtype):
    """Whose own sums of ones end at 256 and at 2,048: models that compute in it show such logits."""
    logits, choices = torch.zeros(9000, 4, dtype=dtype, requires_grad=True), torch.arange(18000).reshape(9000, 2) % 4
    balancing, router_z = load_balancing_loss(logits, choices), router_z_loss(logits)
    assert (balancing.dtype, router_z.dtype) == (dtype, dtype)
    assert balancing.item() == pytest.approx(2, rel=0.01) and router_z.item() == pytest.approx(1.922, rel=0.01)
    (balancing + router_z).backward()
    assert logits.grad.dtype == dtype


@pytest.mark.parametrize(
    ("logits", "choices", "score", "words"),
    [
        (
            torch.ones(3),
            torch.ones(3, 2),
            "softmax",
            r"logits must have shape \[num_tokens, num_choices\] .* got \[3\] of",
        ),
        (torch.ones(3, 4).int(), torch.ones(3, 2), "softmax", r"a floating dtype, got \[3, 4\] of int32"),
        (torch.ones(3, 4), torch.ones(2, 2), "softmax", r"choices must have shape \[3, num_topk\].* got \[2, 2\]"),
        (torch.ones(3, 4), torch.ones(3), "softmax", r"choices must have shape \[3, num_topk\].* got \[3\]"),
        (torch.ones(3, 4), torch.ones(3, 2), "soft", r"score must be one of softmax, sigmoid; got 'soft'"),
    ],
)
def test_losses_say_what_is_wrong(logits, choices, score, words):
    with pytest.raises(ValueError, match=words):
        load_balancing_loss(logits, choices.long(), score)
    if "logits" in words:
        with pytest.raises(ValueError, match=words):
            router_z_loss(logits)


def test_a_module_returns_the_loss_and_its_gradients():
    config = tiny_config(num_ranks=1, dtype="float64", router=RouterKind(logit_bias=True))
    how = dict(train=True, load_balancing=0.3, router_z=0.2)
    module, plain = make_module(config, return_aux=True, **how), make_module(config, train=True)
    x = tokens(config, 17).requires_grad_()
    y, loss = module(x)
    assert torch.equal(y, plain(x))
    logits = x @ module.router.T + module.router_bias
    expected = 0.3 * load_balancing_loss(logits, logits.topk(config.num_topk).indices) + 0.2 * router_z_loss(logits)
    assert torch.allclose(loss, expected, rtol=1e-12)
    wanted = [x, module.router, module.router_bias]
    ours, theirs = (torch.autograd.grad(of, wanted, retain_graph=True) for of in (loss, expected))
    pairs = zip(ours, theirs, strict=True)
    assert all(torch.allclose(ours, theirs, rtol=1e-10, atol=1e-14) for ours, theirs in pairs)
    (y.square().sum() + loss).backward()
    plain(x := x.detach().requires_grad_()).square().sum().backward()
    assert torch.allclose(module.router.grad, plain.router.grad + theirs[1], rtol=1e-9, atol=1e-12)
    assert torch.equal(module.up_proj.grad, plain.up_proj.grad)
    with torch.no_grad():
        again, same = module(x)
    assert torch.equal(again, y) and torch.equal(same, loss) and not same.requires_grad
    del y, loss
    assert not KEPT


def test_says_what_is_wrong():
    with pytest.raises(ValueError, match="router_z must be at least 0 and finite, got -1"):
        make_module(train=True, return_aux=True, router_z=-1)
    other = tiny_config(num_ranks=1, router=RouterKind(score="sqrt_softplus"))
    with pytest.raises(ValueError, match=r"none of softmax, sigmoid; got 'sqrt_softplus'"):
        make_module(other, train=True, return_aux=True)
    module = make_module(CONFIG, train=True, return_aux=True)
    idx = torch.zeros(7, 2, dtype=torch.int64) + torch.arange(2)
    with pytest.raises(ValueError, match="topk_weights must be None with return_aux=True"):
        module(tokens(), idx, torch.ones(7, 2))
