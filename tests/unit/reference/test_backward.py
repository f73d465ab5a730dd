"""Gradients against central differences of `moe_layer`, for all kinds of routers, experts and layers."""

from dataclasses import replace

import numpy as np
import pytest
from gradient_cases import SHARED, Case, make_config, router_config
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import EXPERTS, NORMED, ROUTERS, expert_kinds, router_kinds

from reference import ACTIVATIONS, ExpertKind, RouterKind, make_packets


@pytest.mark.parametrize("capacity", [None, 2])
@pytest.mark.parametrize("name", ROUTERS)
def test_routers(name, capacity):
    """With a capacity a dropped pair is in the norm and adds nothing."""
    case = Case(router_config(ROUTERS[name], capacity=capacity), [7])
    seen, kind = case.check(), ROUTERS[name]
    assert seen >= {"x[0]", "router", "up_bias", "down_bias", *(["router_bias"] if kind.logit_bias else [])}
    assert "selection_bias" not in seen and ("expert_scale" in seen) == kind.expert_scale
    assert capacity is None or any(make_packets(np.array(idx), case.config).dropped for idx in case.idx())


PLAIN = {
    f"{a}, {'gated' if g else 'plain'}": ExpertKind(activation=a, gated=g) for a in ACTIVATIONS for g in (0 > 1, True)
}


STEEP = {"steep": replace(EXPERTS["inkling2"], slope=1.702, up_offset=-0.25)}


@pytest.mark.parametrize("name", [*PLAIN, *EXPERTS, *STEEP, "normed"])
def test_experts(name):
    kind = (PLAIN | EXPERTS | STEEP | {"normed": NORMED})[name]
    case = Case(make_config(expert=kind, **(SHARED if name != "normed" else {})), [7, 3])
    seen = case.check()
    assert seen >= {"x[0]", "x[1]", "router", "up_proj", "down_proj", "up_bias", "down_bias"}
    assert name == "normed" or seen >= {"shared_up_proj", "shared_down_proj", "shared_gate_weight"}


MORE = {
    "every expert": dict(num_topk=6, capacity=2),
    "one": dict(num_topk=1, num_experts=2, num_tokens=1, hidden=1, ffn=1),
    "shared without a gate": dict(shared_ffn=4),
    "shared of another kind": SHARED | dict(shared_expert=EXPERTS["inkling2"]),
    "zero experts": dict(num_zero=5, num_topk=5, renormalize=False),
    "zero experts that add nothing": dict(num_zero=5, num_topk=5, zero="none"),
    "weights on the input": dict(router=RouterKind(score="sigmoid", weight_input=True), num_zero=3, **SHARED),
    "a norm behind weights on the input": dict(router=RouterKind(weight_input=True), expert=NORMED),
    "a norm that is not reached": dict(router=RouterKind(renormalize=True, norm_min=0.9)),
}


@pytest.mark.parametrize("routing", ["own", "given", "of logits"])
@pytest.mark.parametrize("name", MORE)
def test_layers(name, routing):
    config = make_config(**MORE[name])
    case = Case(
        config, [config.num_tokens, 0] if "norm" in name else [config.num_tokens, 1], seed=3, bias="one" not in name
    )
    if routing == "given":
        case.give_routing()
    if routing == "of logits":
        case.give_logits()
    seen = case.check()
    assert ("router" in seen) == (routing == "own" and name != "one")  # one chosen weight is 1, whatever its logit
    assert ("topk_weights" in seen) == (routing == "given")
    assert ("logits" in seen) == (routing == "of logits" and name != "one")


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_layer(data):
    """All kinds in any combination."""
    num_experts, num_zero = data.draw(st.sampled_from([1, 2, 6])), data.draw(st.sampled_from([0, 3]))
    num_topk = data.draw(st.integers(1, num_experts + num_zero))
    router = data.draw(router_kinds(num_experts, num_topk, ("logits", "score", "given"), num_zero))
    expert = data.draw(expert_kinds())
    shared = data.draw(st.sampled_from([{}, dict(shared_ffn=3), SHARED]))
    config = make_config(
        num_ranks=1, num_experts=num_experts, num_zero=num_zero, num_topk=num_topk, router=router, expert=expert,
        capacity=data.draw(st.sampled_from([None, 2])), zero=data.draw(st.sampled_from(["identity", "none"])), **shared,
    )  # fmt: skip
    Case(config, [5], data.draw(st.integers(0, 1000)), data.draw(st.booleans())).check(sure=False)
