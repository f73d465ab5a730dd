"""Modules of a process group of this process alone: graphs, and what is refused."""

import copy

import pytest
import torch
from cases import tiny_config
from tiny_models import make_ids, make_model
from tiny_modules import CONFIG, make_module, tokens

from flashmoe_numba.torch import MoE, join, register, replace_moe_blocks
from flashmoe_numba.torch.session import SESSION
from reference import Weights


@pytest.mark.parametrize("own", ["parameters", "packed"])
def test_compiles_into_one_graph(world, own):
    torch._dynamo.reset()
    module, x = make_module(own=own, process_group=world), tokens(rows=5)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 3):
        assert torch.equal(compiled(x[:rows]), make_module()(x[:rows]))


def test_a_registered_model_compiles_into_one_graph(world):
    torch._dynamo.reset()
    register(process_group=world)
    model = make_model("qwen3_moe")
    expected = model.model.layers[0].mlp(x := torch.randn(1, 5, 48))
    model.set_experts_implementation("flashmoe")
    y = torch.compile(model.model.layers[0].mlp, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, expected)
    register()


def test_modules_have_numbers_of_their_own_and_share_a_layer(world):
    modules = [make_module(seed=seed, process_group=world) for seed in range(3)]
    modules.append(copy.deepcopy(modules[0]))
    for module, seed in zip(modules, (0, 1, 2, 0), strict=True):
        assert torch.equal(module(tokens()), make_module(seed=seed)(tokens()))
    assert [SESSION.ranks(None, world).number_of(module, (), "") for module in modules] == [0, 1, 2, 3]
    assert len([shared for shared in SESSION._shared.values() if shared.ranks is not None]) == 1


def test_after_a_call_that_failed_the_group_has_new_ranks_for_new_modules(world):
    module = make_module(process_group=world)
    with pytest.raises(TypeError, match="dtype float32, got float64"):
        module(tokens().double())
    with pytest.raises(RuntimeError, match="nothing is computed with these ranks any more, because a call failed: x"):
        module(tokens())
    assert torch.equal(make_module(process_group=world)(tokens()), make_module()(tokens()))


def test_a_wait_for_others_that_is_interrupted_closes_their_layers(world, monkeypatch):
    module = make_module(process_group=world)
    module(tokens())
    ranks = SESSION.ranks(None, world)
    (layer,) = (shared.layer for shared in SESSION._shared.values())

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ranks, "_word", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module(tokens())
    assert layer.closed and ranks._words[0][2] == 1
    with pytest.raises(RuntimeError, match="because a call failed: KeyboardInterrupt"):
        module(tokens())


def test_a_module_from_elsewhere_says_so(world):
    module = make_module(process_group=world)
    module._ranks = "of another process"
    with pytest.raises(RuntimeError, match="belongs to the process that made it"):
        module(tokens())


def test_what_fails_inside_join_ends_the_ranks(world):
    module = make_module(process_group=world)
    with pytest.raises(ZeroDivisionError), join(process_group=world):
        raise ZeroDivisionError("planted")
    with pytest.raises(RuntimeError, match="because a call failed: planted"):
        module(tokens())


def refused(call):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    return str(caught.value)


def test_says_what_is_wrong(world):
    two = tiny_config(num_ranks=2)
    weights = Weights.random(two)
    assert refused(lambda: MoE(two, weights)) == (
        "config.num_ranks must be 1 without comm and process_group, because a module is one rank, got 2"
    )
    assert refused(lambda: MoE(two, weights, process_group=world)) == (
        "config.num_ranks must be 1, that of the ranks, got 2"
    )
    assert refused(lambda: MoE(CONFIG, Weights.random(CONFIG), comm=world, process_group=world)) == (
        "comm must be None where process_group is given, got ProcessGroup"
    )
    wrong = "process_group must be a group of torch.distributed or None, got str"
    for call in (lambda: register(process_group="gloo"), lambda: make_module(process_group="gloo")):
        assert refused(call) == wrong
    assert refused(lambda: replace_moe_blocks(make_model("mixtral"), process_group="gloo")) == wrong
    assert "comm must be an mpi4py communicator or None, got int" in refused(lambda: make_module(comm=3))
    assert refused(lambda: join().__enter__()) == (
        "comm or process_group must be given: those are joined whose modules have the same"
    )


def test_a_registered_model_that_was_never_called_here_cannot_be_served(world):
    from flashmoe_numba.torch.operator import serve

    register(process_group=world)
    model, ranks = make_model("qwen3_moe"), SESSION.ranks(None, world)
    model.set_experts_implementation("flashmoe")
    with pytest.raises(RuntimeError, match=r"no module 0 of these ranks, .* with register\(\) call the model once"):
        serve(ranks, 0, 1)
    model(make_ids())
    serve(ranks, 1, 2)
    register()
