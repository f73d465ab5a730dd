"""Kinds of routers and experts to test kernels with: some that public models have, and strategies that draw any."""

from dataclasses import replace

from hypothesis import strategies as st

from reference import ExpertKind, RouterKind
from reference.activations import ACTIVATIONS

V3 = RouterKind(
    score="sigmoid", choice="score", selection_bias=True, num_groups=4, num_topk_groups=2, group_score="top2_sum",
    renormalize=True, norm_eps=1e-20, scale=2.5,
)  # fmt: skip
ROUTERS = {  # for 12 experts that are chosen from
    "deepseek_v2": RouterKind(choice="score", num_groups=3, num_topk_groups=2, scale=16.0),
    "deepseek_v3": V3,
    "mistral4": replace(V3, score="softmax", num_topk_groups=1, group_fill="zero"),
    "groups of one": replace(V3, num_groups=12, num_topk_groups=4, group_score="max", norm_eps=0.1),
    "deepseek_v4": replace(V3, score="sqrt_softplus", num_groups=1, num_topk_groups=1),
    "deepseek_v4_hash": RouterKind(score="sqrt_softplus", choice="given", renormalize=True, scale=1.5),
    "dbrx": RouterKind(renormalize=True, norm_order=2.0),
    "ernie4_5": RouterKind(choice="score", selection_bias=True, renormalize=True, norm_min=0.3),
    "phimoe": RouterKind(score="sparsemixer", jitter=0.3),
    "inkling": replace(V3, num_groups=1, num_topk_groups=1, num_always=2),
    "laguna": RouterKind(score="sigmoid", logit_cap=0.5, logit_scale=1.5, renormalize=True),
    "gpt_oss": RouterKind(renormalize=True, logit_bias=True),
    "gemma4": RouterKind(renormalize=True, expert_scale=True),
    "kolibri1": RouterKind(score="sigmoid", selection_bias=True, renormalize=True),
    "llama4": RouterKind(score="sigmoid", weight_input=True),
}
EXPERTS = {
    "gpt_oss": ExpertKind(
        activation="silu", gated=True, bound="clamp", gate_limit=0.8, up_limit=0.6, slope=1.702, up_offset=1.0
    ),
    "step3p7": ExpertKind(activation="silu", gated=True, bound="clamp_activated", gate_limit=0.4, up_limit=0.6),
    "inkling2": ExpertKind(activation="silu", gated=True, bound="softcap", gate_limit=0.7, up_limit=0.9),
}
NORMED = ExpertKind(activation="silu", gated=True, norm_eps=1e-5)  # muse_spark


def divisors(number):
    return [d for d in range(1, number + 1) if number % d == 0]


@st.composite
def router_kinds(draw, num_experts, num_topk, choices=("logits", "score"), num_zero=0):
    """Any kind that a layer of these sizes may have."""
    fields = dict(
        score=draw(st.sampled_from(["softmax", "sigmoid", "sqrt_softplus", "sparsemixer"])),
        logit_bias=draw(st.booleans()),
        logit_scale=draw(st.sampled_from([1.0, 0.5, 3.0])),
        logit_cap=draw(st.sampled_from([None, 0.5, 30.0])),
        scale=draw(st.sampled_from([1.0, 2.5, -0.5])),
        expert_scale=draw(st.booleans()),
        weight_input=draw(st.booleans()),
    )
    if fields["score"] == "sparsemixer" and "logits" in choices:
        return RouterKind(**fields, jitter=draw(st.sampled_from([0.0, 0.01, 0.5])))
    fields["score"] = fields["score"].replace("sparsemixer", "softmax")
    choice = draw(st.sampled_from(choices))
    if choice != "given":
        fields |= draw(_choosing(num_experts + num_zero, num_topk, with_always=num_zero == 0))
    if draw(st.booleans()):
        fields |= dict(
            renormalize=True,
            norm_order=draw(st.sampled_from([1.0, 2.0])),
            norm_eps=draw(st.sampled_from([0.0, 1e-20, 0.1])),
            norm_min=draw(st.sampled_from([0.0, 0.3])),
        )
    return RouterKind(choice=choice, **fields)


@st.composite
def _choosing(draw, num_choices, num_topk, with_always):
    """Fields of a router that chooses by groups and biases."""
    num_always = draw(st.integers(0, num_topk if with_always and num_topk < num_choices else 0))
    chosen_from, chosen = num_choices - num_always, num_topk - num_always
    num_groups = draw(st.sampled_from(divisors(chosen_from)))
    size = chosen_from // num_groups
    return dict(
        num_always=num_always,
        num_groups=num_groups,
        num_topk_groups=draw(st.integers(max(1, -(-chosen // size)), num_groups)),
        group_score=draw(st.sampled_from(["max", "top2_sum"] if size > 1 else ["max"])),
        group_fill=draw(st.sampled_from(["lowest", "zero"])),
        selection_bias=draw(st.booleans()),
    )


@st.composite
def expert_kinds(draw):
    """Any without a norm of results, whose error bound is another one."""
    activation, gated = draw(st.sampled_from(ACTIVATIONS)), draw(st.booleans())
    if not gated or draw(st.booleans()):
        return ExpertKind(activation=activation, gated=gated)
    limits = st.sampled_from([0.3, 1.0, 7.0])
    numbers = dict(slope=draw(st.sampled_from([1.0, 1.702])), up_offset=draw(st.sampled_from([0.0, 1.0, -0.25])))
    bound = draw(st.sampled_from(["none", "clamp", "clamp_activated", "softcap"]))
    if bound == "softcap":
        return ExpertKind(
            activation="silu", gated=True, bound=bound, gate_limit=draw(limits), up_limit=draw(limits), **numbers
        )
    if bound != "none":
        numbers |= dict(gate_limit=draw(st.none() | limits), up_limit=draw(st.none() | limits))
    return ExpertKind(activation=activation, gated=True, bound=bound, **numbers)
