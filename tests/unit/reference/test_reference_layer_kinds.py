"""What a config's kinds of router and experts say, against its weights."""

import pytest

from reference import ACTIVATIONS, MoEConfig, Weights
from reference.layer_kinds import ExpertKind, RouterKind

SIZES = dict(num_ranks=1, num_tokens=3, hidden=4, ffn=5, num_experts=2, num_topk=1)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_an_expert_has_the_matrices_of_its_kind(gated, bias):
    config = MoEConfig(**SIZES, gated=gated, activation="silu", renormalize=False)
    kind, weights = config.expert_kind, Weights.random(config, bias=bias)
    assert kind == ExpertKind(activation="silu", gated=gated)
    assert config.router_kind == RouterKind(score="softmax", renormalize=False)
    assert len(weights.ups) == kind.num_ups == kind.num_matrices - 1 == len(kind.projections) - 1
    assert [array is not None for _, array in weights.ups] == [bias] * kind.num_ups
    assert weights.ups[-1][0] is weights.up_proj and weights.ups[0][0] is (
        weights.gate_proj if gated else weights.up_proj
    )
    assert ACTIVATIONS[kind.activation_idx] == "silu"
