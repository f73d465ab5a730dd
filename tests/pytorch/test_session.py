"""Layers that modules share: what becomes of them when a call is interrupted, and under several threads."""

import threading
import time

import pytest
import torch
from tiny_modules import make_module, tokens

from flashmoe_numba.torch import release
from flashmoe_numba.torch.session import SESSION


def interrupt(module):
    """A call that ends in the middle, so that its layer is closed."""
    (shared,) = SESSION._shared.values()

    def run(*_):
        raise KeyboardInterrupt

    shared.layer._backend.run = run
    with pytest.raises(KeyboardInterrupt):
        module(tokens())
    assert shared.layer.closed


def test_after_an_interrupted_call_modules_get_another_layer():
    modules = [make_module(seed=seed) for seed in (0, 1)]
    before = [module(tokens()) for module in modules]
    interrupt(modules[0])
    for module, expected in zip(modules, before, strict=True):
        assert torch.equal(module(tokens()), expected)
    assert len(SESSION._shared) == 1 and len(SESSION._entries) == 2


def test_after_an_interrupted_call_packed_weights_are_whole():
    plain, module, x = make_module(seed=2), make_module(seed=2, own="packed"), tokens()
    interrupt(module)
    with pytest.raises(RuntimeError, match=r"closed, because a call was interrupted .*load_state_dict\(\{\}, strict"):
        module(x)
    make_module(own="packed")(x)  # another of these sizes has another layer
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in plain.state_dict().items())
    module.load_state_dict({}, strict=False)
    assert torch.equal(module(x), plain(x))


def test_weights_go_after_their_layer():
    module = make_module()
    module(tokens())
    (shared,) = SESSION._shared.values()
    shared.layer.close()
    del module, shared  # what a finalizer raises fails a test
    assert not SESSION._entries


def test_threads_pack_a_module_once(monkeypatch):
    module, made, make = make_module(), [], SESSION._make
    gate = threading.Barrier(4)

    def slowly(*parts):
        made.append(parts)
        time.sleep(0.2)  # for the others to come to where they have not found it
        return make(*parts)

    monkeypatch.setattr(SESSION, "_make", slowly)
    results = [None] * 4

    def call(position):
        gate.wait()
        results[position] = module(tokens())

    threads = [threading.Thread(target=call, args=(position,)) for position in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert all(torch.equal(result, results[0]) for result in results)


def test_nobody_closes_a_layer_before_its_weights_are_found(monkeypatch):
    keep, others = SESSION._keep, []

    def late(*parts):
        others.append(threading.Thread(target=release))
        others[-1].start()
        others[-1].join(0.3)  # it must wait, so this passes in any case
        return keep(*parts)

    monkeypatch.setattr(SESSION, "_keep", late)
    module = make_module(own="packed")
    others[0].join()
    assert torch.equal(module(tokens()), make_module()(tokens()))


def test_a_module_made_under_inference_mode_follows_its_weights():
    with torch.inference_mode():
        tensors = dict(make_module().state_dict())
        tensors["up_proj"] = tensors["up_proj"].clone()
        assert tensors["up_proj"].is_inference()
        modules = [make_module(), type(make_module())(make_module().config, tensors)]
        for module in modules:
            module(tokens())
            module.load_state_dict(make_module(seed=3).state_dict())
            assert torch.equal(module(tokens()), make_module(seed=3)(tokens()))
