"""`MoE` with routers, experts, shared and zero-computation experts of every sort: a description must keep them all."""

import pytest
import torch
from cases import assert_equals_oracle, random_tokens, tiny_config
from kinds import EXPERTS, NORMED, ROUTERS

from flashmoe_numba import FlashMoE
from flashmoe_numba.heap.tensors import as_array, as_tensor
from flashmoe_numba.torch import MoE
from reference import ExpertKind, Weights

KINDS = {  # changes of a config with 12 experts, all that a description must keep
    "expert": dict(expert=EXPERTS["gpt_oss"]),
    "normed": dict(expert=NORMED),
    "not gated": dict(gated=False, activation="relu2"),
    "shared": dict(shared_ffn=5),
    "shared of its own": dict(shared_ffn=5, shared_expert=ExpertKind(activation="gelu", gated=True), shared_gate=True),
    "zero": dict(num_zero=3, zero="identity"),
    "zero of none": dict(num_zero=3, zero="none", shared_ffn=3),
    **{name: dict(router=kind) for name, kind in ROUTERS.items()},
}


@pytest.mark.parametrize("own", ["parameters", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_the_oracle(kind, own):
    config = tiny_config(num_ranks=1, num_experts=12, num_topk=3, **KINDS[kind])
    weights, x = Weights.random(config, bias=True), random_tokens(config)
    fixed = config.router_kind.choice == "given"
    given = dict(topk_idx=torch.arange(21).reshape(7, 3) % 12) if fixed else {}
    with FlashMoE(config, weights) as layer:
        plain = layer(x, **{name: [part.numpy()] for name, part in given.items()})
        routings = layer.routing
    y = MoE(config, weights, own=own)(as_tensor(x[0]), **given)
    assert torch.equal(y, as_tensor(plain[0]))
    if kind != "normed":  # whose error bound is another one
        assert_equals_oracle([as_array("y", y)], x, weights, config, routings)
