"""`MoE` with gradients: checked by differences, against the oracle, and as PyTorch's own machinery asks for them."""

import gc

import numpy as np
import pytest
import torch
from cases import random_routing, tiny_config
from kinds import NORMED
from tiny_modules import CONFIG, make_module, tokens
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from flashmoe_numba.torch import MoE, release
from flashmoe_numba.torch.kept_calls import KEPT
from flashmoe_numba.torch.session import SESSION
from flashmoe_numba.torch.training import moe_layer_kept
from reference import RouterKind, Weights
from reference.backward import moe_layer_backward

SMALL = dict(num_ranks=1, num_experts=3, hidden=3, ffn=2, dtype="float64", num_tokens=3)
DEEPSEEK = RouterKind(score="sigmoid", choice="score", selection_bias=True, renormalize=True, norm_eps=1e-3, scale=2.5)
KINDS = {
    "softmax": tiny_config(**SMALL),
    "all_experts": tiny_config(**SMALL | dict(num_topk=3)),
    "shared": tiny_config(**SMALL, shared_ffn=2, shared_gate=True),
    "sigmoid": tiny_config(**SMALL, router=DEEPSEEK),
    "biases_and_scales": tiny_config(**SMALL, router=RouterKind(logit_bias=True, expert_scale=True)),
    "weight_on_input": tiny_config(**SMALL, router=RouterKind(score="sigmoid", weight_input=True)),
    "not_gated": tiny_config(**SMALL, gated=False, activation="gelu"),
    "normed": tiny_config(**SMALL, expert=NORMED, num_zero=1),
}


@pytest.fixture(autouse=True)
def nothing_is_kept():
    """What forwards kept goes with their graphs."""
    yield
    gc.collect()
    assert not KEPT


def functional(module):
    """(the module as a function of tokens, parameters and what else is given, its parameters)."""
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]

    def function(x, *given):
        parameters = dict(zip(names, given, strict=False))
        # copies: differences are made in place without a version, which docs/torch.md says is not noticed
        copies = {name: parameter.clone() for name, parameter in parameters.items()}
        return torch.func.functional_call(module, copies, (x, *given[len(names) :]))

    return function, [module.get_parameter(name) for name in names]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_differences(kind):
    module = make_module(KINDS[kind], train=True)
    function, parameters = functional(module)
    x = tokens(module.config, 3).requires_grad_()
    assert torch.autograd.gradcheck(function, (x, *parameters))


def test_gradients_of_a_routing_from_outside_are_those_of_differences():
    module = make_module(KINDS["shared"], train=True)
    function, parameters = functional(module)
    idx, factors = (torch.from_numpy(part[0]) for part in random_routing(module.config, [3]))
    x = tokens(module.config, 3).requires_grad_()
    given = x, *parameters, idx, factors.double().requires_grad_()
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    keep = [name != "router" for name in names]  # it has no part in it
    given = x, *[p if asked else p.detach() for p, asked in zip(parameters, keep, strict=True)], *given[-2:]
    assert torch.autograd.gradcheck(function, given)


def test_gradients_of_logits_from_outside_are_those_of_differences():
    module = make_module(KINDS["softmax"], train=True)
    logits = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    x = tokens(module.config, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, logits: module(x, logits=logits), (x, logits))


def gradients(module, x, call=None, scale=1.0):
    """Of a loss that has no special point; x's, then the parameters'."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    y = (module if call is None else call)(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape) * scale).sum().backward()
    return [x.grad, *[parameter.grad for parameter in module.parameters()]]


def equal(found, expected):
    pairs = list(zip(found, expected, strict=True))
    assert pairs and all(a is not None for a, _ in pairs)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(("dtype", "save"), [("float32", "rows"), ("float32", "nothing"), ("bfloat16", "rows+up")])
def test_gradients_have_the_parameters_types_and_are_rounded_once(dtype, save):
    config = tiny_config(num_ranks=1, dtype=dtype)
    weights, x = Weights.random(config, bias=True), tokens(config)
    found = gradients(module := MoE(config, weights, train=True, save=save), x)
    assert all(a.dtype == p.dtype and a.shape == p.shape for a, p in zip(found[1:], module.parameters(), strict=True))
    dy = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape)
    exact = moe_layer_backward([x.double().numpy()], [dy.double().numpy()], weights, config)
    expected = [exact.x[0], *[getattr(exact.weights, name) for name, _ in module.named_parameters()]]
    eps = torch.finfo(x.dtype).eps
    for gradient, value in zip(found, expected, strict=True):
        value = torch.from_numpy(np.asarray(value, np.float64))
        assert (gradient.double() - value).abs().max() < 4 * eps * value.abs().max()


def test_more_tokens_than_a_call_takes_change_no_bit():
    whole = tiny_config(num_ranks=1, num_tokens=29)
    x = tokens(whole, 29)
    modules = make_module(train=True), make_module(whole, train=True)
    assert equal(*(gradients(module, x) for module in modules))
    idx, factors = (torch.from_numpy(part[0]) for part in random_routing(whole, [29]))
    logits = torch.randn(29, 4, generator=torch.Generator().manual_seed(6)).requires_grad_()
    found = []
    for module in modules:
        factors = factors.detach().requires_grad_()
        (module(x, idx, factors) * x).sum().backward()
        found.append([factors.grad, *torch.autograd.grad((module(x, logits=logits) * x).sum(), logits)])
    assert equal(*found)


def test_no_tokens_have_gradients_of_zero():
    module = make_module(train=True)
    found = gradients(module, tokens(rows=0))
    assert found[0].shape == (0, 9) and all(gradient.abs().max() == 0 for gradient in found[1:])


# PyTorch's machinery


def test_opcheck():
    module, x = make_module(train=True), tokens().requires_grad_()
    tensors = list(module.parameters())
    torch.library.opcheck(moe_layer_kept, (x, None, None, None, tensors, module._description))
    routing = torch.zeros(7, 1, dtype=torch.int64), torch.ones(7, 1, requires_grad=True)
    description = module._description.replace("num_topk=2", "num_topk=1")
    torch.library.opcheck(moe_layer_kept, (x, *routing, None, tensors, description))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_into_one_graph(backend):
    torch._dynamo.reset()
    module = make_module(train=True)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    for rows in (5, 7, 3):
        x = tokens(rows=rows)
        assert equal(gradients(module, x, compiled), gradients(module, x))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit_and_keeps_nothing(use_reentrant):
    module, x = make_module(train=True), tokens()
    kept = []

    def again(x):
        y = checkpoint(module, x, use_reentrant=use_reentrant)
        kept.append(len(KEPT))
        return y

    assert equal(gradients(module, x, again), gradients(module, x))
    assert kept == [0]


def test_a_retained_graph_has_the_same_gradients_again():
    module, x = make_module(train=True), tokens().requires_grad_()
    y = module(x)
    first = torch.autograd.grad(y.sum(), [x, *module.parameters()], retain_graph=True)
    between = gradients(module, tokens(seed=3))
    again = torch.autograd.grad(y.sum(), [x, *module.parameters()])
    assert equal(again, first) and not equal(between, first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), x)


def test_memory_of_a_graph_that_is_gone_is_the_next_calls():
    """Else every step would take new memory, and touch all of its pages for the first time."""
    module, found = make_module(train=True), []
    for _ in range(3):
        y = module(tokens(module.config, 5))
        ((saved,),) = (of_graph.saved for of_graph in KEPT.values())
        found.append(saved._kept[0].arrays)
        y.sum().backward()
        del y
        gc.collect()
        assert saved.closed
    assert found[1] is found[0] and found[2] is found[0]


def test_gradients_of_micro_batches_add_up():
    module, parts = make_module(train=True), [tokens(seed=seed) for seed in (1, 2)]
    apart = [gradients(module, part)[1:] for part in parts]
    module.zero_grad()
    ys = [module(part) for part in parts]
    for y in reversed(ys):  # in any order
        (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
    assert equal([p.grad for p in module.parameters()], [b + a for a, b in zip(*apart, strict=True)])


def of_experts(module):
    return [parameter.grad for name, parameter in module.named_parameters() if name != "router"]


def test_fused_accumulation_gives_the_bits_of_one_batch():
    x = tokens(tiny_config(num_ranks=1, num_tokens=21), 21)
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    module, plain = make_module(train=True, fused_accumulation=True), make_module(train=True)
    for of in (module, plain):
        (of(x) * dy).sum().backward()
    assert torch.equal(module.router.grad, plain.router.grad)
    whole = of_experts(plain)
    assert equal(of_experts(module), whole)
    for of in (module, plain):
        of.zero_grad()
        for begin in range(0, 21, 3):
            part = slice(begin, begin + 3)
            (of(x[part]) * dy[part]).sum().backward()
    assert equal(of_experts(module), whole)
    assert not equal(of_experts(plain), whole)
    assert torch.equal(module.router.grad, plain.router.grad)  # which is added up by PyTorch
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"fused_accumulation=True adds to \.grad where it is"):
        torch.compile(module, backend="aot_eager")(x).sum().backward()


def test_hooks_that_copy_what_is_saved_are_told():
    module, x = make_module(train=True), tokens()
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor):
        y = module(x)
    with pytest.raises(RuntimeError, match="its ticket was copied, by hooks on saved tensors say"):
        y.sum().backward()


@pytest.mark.parametrize("frozen", [False, True])
def test_second_derivatives_are_refused(frozen):
    """Not left out: the gradient of y.sum() by y depends on nothing, so PyTorch takes that by x for a constant."""
    module, x = make_module(train=True).requires_grad_(not frozen), tokens().requires_grad_()
    with pytest.raises(RuntimeError, match="create_graph must be False: a MoE layer has no second derivatives"):
        torch.autograd.grad(module(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.functional.hessian(lambda x: module(x).sum(), x)
    x.grad = None
    module(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("train", [False, True])
def test_forward_mode_derivatives_are_refused(train):
    module, x = make_module(train=train), tokens()
    with pytest.raises(RuntimeError, match="must have no tangents: a MoE layer has no forward-mode derivatives"):
        torch.func.jvp(module, (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="must have no tangents"):
        module.requires_grad_(False)(forward_ad.make_dual(x, x))
    module(x)


# weights


def test_a_layer_with_a_norm_of_results_learns():
    """To give the results of another one."""
    config = KINDS["normed"]
    teacher, module, x = make_module(config, seed=1), make_module(config, train=True), tokens(config, 3)
    with torch.no_grad():
        wanted, before = teacher(x), module.result_scale.clone()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (module(x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 5
    assert (module.result_scale != before).all()


class ByData(torch.optim.SGD):
    """Writes to `.data`, as optimizers did once."""

    def step(self):
        for parameter in self.param_groups[0]["params"]:
            parameter.data.add_(parameter.grad, alpha=-0.5)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("kind", "how"), [(torch.optim.SGD, {}), (torch.optim.SGD, dict(fused=True)), (ByData, {})])
def test_a_step_of_an_optimizer_reaches_both_copies(kind, how, compiled):
    """Also where PyTorch itself counts no version: its fused optimizers do not."""
    module, x = make_module(train=True), tokens()
    gradients(module, x)
    before, optimizer = module.up_proj.detach().clone(), kind(module.parameters(), lr=0.5, **how)
    torch._dynamo.reset()
    (torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step)()
    assert not torch.equal(module.up_proj, before)
    fresh = MoE(CONFIG, {name: p.detach().clone() for name, p in module.named_parameters()}, train=True)
    assert torch.equal(module(x), fresh(x))
    assert equal(gradients(module, x), gradients(fresh, x))


@pytest.mark.parametrize("name", ["router", "up_proj"])
def test_a_backward_of_weights_that_changed_is_an_error(name):
    module, x = make_module(train=True), tokens()
    y = module(x)
    with torch.no_grad():
        module.get_parameter(name).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = module(x)
    module.up_proj.data = module.up_proj.data * 2  # other memory: what was packed may be filled with others then
    module(x)
    del y


def test_a_backward_of_tensors_that_went_is_that_of_what_there_was():
    """Their layer is not closed while a call waits for its backward, though no weights of it are left."""
    module, x = make_module(train=True), tokens()
    release()
    expected = gradients(module, x)[1:]
    module.zero_grad()
    dy = torch.linspace(-1, 1, x.numel()).reshape(x.shape)
    y = module(x)
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
    release()
    y.backward(dy)
    assert equal([parameter.grad for parameter in module.parameters()], expected)
    (shared,) = SESSION._shared.values()
    del y
    gc.collect()
    release()
    assert shared.layer.closed


def test_a_fused_step_before_a_backward_is_an_error_too():
    module, x = make_module(train=True), tokens()
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    (first := module(x)).sum().backward(retain_graph=True)
    other = torch.nn.Parameter(torch.ones(3))
    (beside := other.square().sum()).backward(retain_graph=True)
    optimizer.add_param_group(dict(params=[other]))
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.sum().backward()
    beside.backward()  # what is not a layer's is left to PyTorch
    module.router.grad = None
    version = module.router._version
    optimizer.step()
    assert module.router._version == version


@pytest.mark.parametrize("frozen", ["experts", "router"])
def test_frozen_weights_have_no_tasks(frozen, monkeypatch):
    module, x = make_module(train=True), tokens()
    whole = gradients(module, x)
    names = [name for name, _ in module.named_parameters()]
    for name in names:
        if (name == "router") == (frozen == "router"):
            module.get_parameter(name).requires_grad_(False)
    module(x)
    (shared,) = SESSION._shared.values()
    made, backward = [], shared.layer.backward
    monkeypatch.setattr(shared.layer, "backward", lambda *a, **how: made.append(backward(*a, **how)) or made[-1])
    found = gradients(module, x)
    (arrays,) = made[0].arrays
    assert (arrays.up.size > 0, arrays.router.size > 0) == (frozen != "experts", frozen != "router")
    for name, gradient, expected in zip(["x", *names], found, whole, strict=True):
        if name != "x" and not module.get_parameter(name).requires_grad:
            assert gradient is None
        else:
            assert torch.equal(gradient, expected)


def test_without_gradients_nothing_is_kept():
    module, x = make_module(train=True), tokens()
    with torch.no_grad():
        y = module(x)
    assert not KEPT and not y.requires_grad and torch.equal(y, make_module()(x))
    graph = module(x)
    assert len(KEPT) == 1 and torch.equal(graph, y)


def test_says_what_is_wrong():
    for arguments, words in (
        (dict(train=True, own="packed"), "own must be 'parameters' with train=True"),
        (dict(train=True, save="all"), "save"),
        (dict(fused_accumulation=True), "fused_accumulation must be False without train=True"),
        (dict(return_aux=True), "return_aux must be False without train=True"),
    ):
        with pytest.raises(ValueError, match=words):
            make_module(**arguments)
    for name in ("train", "fused_accumulation", "return_aux"):
        with pytest.raises(TypeError, match=f"{name} must be True or False, got 1"):
            make_module(**{name: 1})
    for value in (-1, np.nan, np.inf):
        with pytest.raises(ValueError, match=f"router_z must be at least 0 and finite, got {value}"):
            make_module(train=True, return_aux=True, router_z=value)
    half = tiny_config(num_ranks=1, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"fused_accumulation must be False .*gate_proj has bfloat16"):
        make_module(half, train=True, fused_accumulation=True)
    module = make_module(train=True, fused_accumulation=True).bfloat16()
    with pytest.raises(ValueError, match=r"fused_accumulation must be False .*gate_proj has bfloat16"):
        module(tokens().bfloat16())
