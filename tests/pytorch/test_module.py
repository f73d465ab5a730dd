"""`MoE` and the operator: against the oracle, in graphs, without gradients, and following its weights."""

import copy

import numpy as np
import pytest
import torch
from cases import DTYPES, assert_equals_oracle, random_tokens, tiny_config
from tiny_modules import CONFIG, make_module, tokens

from flashmoe_numba import FlashMoE
from flashmoe_numba.heap.tensors import as_array, as_tensor
from flashmoe_numba.torch import MoE
from flashmoe_numba.torch.operator import moe_layer
from flashmoe_numba.torch.session import SESSION
from reference import Weights


def expected(module, x):
    """A layer of NumPy's arrays."""
    weights = Weights(**{name: as_array(name, p.detach().clone()) for name, p in module.named_parameters()})
    with FlashMoE(module.config, weights) as layer:
        return as_tensor(layer([as_array("x", x)])[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_oracle(dtype):
    config = tiny_config(num_ranks=1, dtype=dtype)
    weights, x = Weights.random(config, bias=True), random_tokens(config)
    with FlashMoE(config, weights) as layer:
        layer(x)
        routings = layer.routing
    y = MoE(config, weights)(as_tensor(x[0]))
    assert y.dtype == getattr(torch, dtype)
    assert_equals_oracle([as_array("y", y)], x, weights, config, routings)


def test_more_tokens_than_a_call_takes_change_no_bit():
    x = tokens(tiny_config(num_ranks=1, num_tokens=29), 29).reshape(1, 29, 9)
    assert torch.equal(make_module()(x), make_module(tiny_config(num_ranks=1, num_tokens=29))(x))
    assert make_module()(x[:, :0]).shape == (1, 0, 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_takes_a_routing_from_outside(dtype):
    x, generator = tokens(rows=17), torch.Generator().manual_seed(4)
    idx = torch.rand(17, 4, generator=generator).argsort(1)[:, :2]
    factors = torch.rand(17, 2, generator=generator).to(dtype)
    y = make_module()(x, idx, factors)
    with FlashMoE(tiny_config(num_ranks=1, num_tokens=17), Weights.random(CONFIG, bias=True)) as layer:
        given = dict(topk_idx=[idx.numpy()], topk_weights=[factors.double().numpy()])
        assert torch.equal(y, as_tensor(layer([x.numpy()], **given)[0]))


# graphs


@pytest.mark.parametrize("own", ["parameters", "packed"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_into_one_graph_for_any_number_of_tokens(own, backend):
    torch._dynamo.reset()
    module = make_module(own=own)
    frames = []

    def counting(graph, inputs):
        frames.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counting)
    for rows in (5, 7, 3):
        x = tokens(rows=rows)
        assert torch.equal(compiled(x), module(x))
    assert len(frames) == 1


def test_a_compiled_module_follows_its_weights():
    torch._dynamo.reset()
    module, x = make_module(), tokens()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    before = compiled(x)
    module.down_proj.mul_(2)
    module.down_bias.mul_(2)
    assert torch.equal(compiled(x), 2 * before)


def test_exports_with_dynamic_tokens():
    module = make_module()
    exported = torch.export.export(module, (tokens(),), dynamic_shapes=({0: torch.export.Dim("n", min=2, max=99)},))
    assert "flashmoe.moe_layer" in str(exported.graph)
    x = tokens(tiny_config(num_ranks=1, num_tokens=13), 13)
    assert torch.equal(exported.module()(x), module(x))


def test_opcheck():
    module, x = make_module(), tokens()
    tensors = list(module.parameters())
    routing = torch.zeros(7, 1, dtype=torch.int64), torch.ones(7, 1)
    torch.library.opcheck(moe_layer, (x, None, None, None, tensors, module._description))
    description = module._description.replace("num_topk=2", "num_topk=1")
    torch.library.opcheck(moe_layer, (x, *routing, None, tensors, description))


# gradients


@pytest.mark.parametrize("what", ["tokens", "weights"])
def test_refuses_gradients(what):
    module, x = make_module(), tokens()
    (x if what == "tokens" else module.router).requires_grad_()
    calls = [
        module,
        torch.compile(module, backend="aot_eager"),
        torch.compile(module, backend="aot_eager", fullgraph=True),
    ]
    for call in calls:
        torch._dynamo.reset()
        with pytest.raises(Exception, match=r"made for inference, .*make it with train=True"):
            call(x)
    with torch.no_grad():
        assert not module(x).requires_grad
    with torch.inference_mode():
        module(x)


def test_the_layer_itself_refuses_gradients():
    rule = r"x\[0\] must not require gradients: .*has gradients, with train=True"
    with FlashMoE(CONFIG, Weights.random(CONFIG)) as layer, pytest.raises(ValueError, match=rule):
        layer([tokens().requires_grad_()])


# the layer itself


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["cpu", "fibers"])
def test_the_layer_takes_tensors_for_arrays(dtype, backend):
    config = tiny_config(dtype=dtype)
    arrays = np.stack(random_tokens(config))
    x = as_tensor(arrays)
    assert x.data_ptr() == arrays.ctypes.data
    with FlashMoE(config, Weights.random(config), backend=backend) as layer:
        y = layer(arrays)
        assert torch.equal(layer(x), as_tensor(y))
        parts = layer([x[0], x[1, :3]])
        assert torch.equal(parts[0], as_tensor(y[0])) and torch.equal(parts[1], as_tensor(y[1, :3]))
        assert torch.equal(layer(x.mT.contiguous().mT), as_tensor(y))
        idx = [torch.from_numpy(routing.topk_idx) for routing in layer.routing]
        factors = [torch.from_numpy(routing.topk_weights) for routing in layer.routing]
        assert torch.equal(layer(x, topk_idx=idx, topk_weights=factors), as_tensor(y))


# weights


def test_notices_changes_in_place_and_new_memory():
    module, x = make_module(), tokens()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    module(x)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.equal(module(x), expected(module, x))
    module.load_state_dict(make_module(seed=5).state_dict())
    assert torch.equal(module(x), expected(make_module(seed=5), x))
    module.up_proj.data = module.up_proj.data * 3  # other memory
    assert torch.equal(module(x), expected(module, x))


def test_a_change_of_data_in_place_is_seen_after_any_change_that_counts():
    """As docs/torch.md says."""
    module, x = make_module(), tokens()
    before = module(x)
    module.down_proj.data.mul_(2)
    module.down_bias.data.mul_(2)
    assert torch.equal(module(x), before)
    module.down_proj.add_(0)
    assert torch.equal(module(x), 2 * before)


def test_modules_of_equal_configs_share_a_layer_and_keep_their_weights():
    modules = [make_module(seed=seed) for seed in range(5)]
    x = tokens()
    for _ in range(2):
        for module in modules:
            assert torch.equal(module(x), expected(module, x))
    assert len(SESSION._shared) == 1 and len(SESSION._entries) == 5
    first = modules.pop(0)
    del first, module
    assert len(SESSION._entries) == 4
    again = make_module(seed=9)
    assert torch.equal(again(x), expected(again, x))
    assert torch.equal(modules[0](x), expected(modules[0], x))


def test_layers_go_with_the_last_module():
    module = make_module()
    module(tokens())
    layer = next(iter(SESSION._shared.values())).layer
    SESSION.release()
    module(tokens())
    del module
    SESSION.release()
    assert not SESSION._shared and layer.closed


# own="packed"


def test_packed_weights_keep_names_and_values():
    plain, packed, x = make_module(), make_module(own="packed"), tokens()
    assert packed.up_proj.is_meta and not packed.router.is_meta
    assert torch.equal(packed(x), plain(x))
    state = packed.state_dict()
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())


def test_packed_weights_are_loaded_by_name_whole_and_in_part():
    plain, packed, x = make_module(), make_module(own="packed"), tokens()
    other = make_module(seed=3).state_dict()
    for names in (["gate_proj", "router"], list(other)):
        part = {name: other[name] for name in names}
        for module in (plain, packed):
            module.load_state_dict(part, strict=False)
        assert torch.equal(packed(x), plain(x))
        assert packed.gate_proj.is_meta


def test_packed_weights_refuse_what_they_cannot_follow():
    module, x = make_module(own="packed"), tokens()
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(module)
    module.router.mul_(2)
    with pytest.raises(RuntimeError, match="change them by load_state_dict"):
        module(x)


# arguments


def test_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"config.num_ranks must be 1"):
        MoE(tiny_config(), Weights.random(tiny_config()))
    with pytest.raises(TypeError, match="weights must be Weights or tensors by name, got list"):
        MoE(CONFIG, [])
    with pytest.raises(ValueError, match="own"):
        make_module(own="both")
    with pytest.raises(TypeError, match="dtype float32, got float64"):
        make_module()(tokens().double())
