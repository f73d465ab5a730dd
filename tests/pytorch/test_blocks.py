"""Swapped blocks: what they return, what is in the layer, and what is refused by name."""

import importlib

import pytest
import torch
from tiny_models import make_model
from transformers import CONFIG_MAPPING

from flashmoe_numba.seeing.trace import decode
from flashmoe_numba.torch import replace_moe_blocks, session
from flashmoe_numba.torch.blocks import adapter_for
from reference.families import read_family
from reference.task_kinds import SHARED0, SHARED1


@pytest.fixture
def layers(monkeypatch):
    """The layers that are made, with traces."""
    made, plain = [], session.FlashMoE
    monkeypatch.setattr(
        session, "FlashMoE", lambda *parts, **how: made.append(plain(*parts, trace=True, **how)) or made[-1]
    )
    return made


def first_block(family):
    model = make_model(family)
    return model.get_submodule(replace_moe_blocks(model)[-1])


def tasks_of(layer):
    return [piece.kind for piece in decode(layer.traces)]


def tokens(rows=2, length=19):
    return torch.randn(rows, length, 48, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2_moe", "llama4_text"])
def test_the_kernel_has_the_shared_expert(family, layers):
    block = first_block(family)
    modules = [
        module
        for name, module in block.named_modules()
        if name in ("shared_expert", "shared_experts", "gate", "router")
    ]
    for module in modules:
        module.register_forward_pre_hook(lambda *_: pytest.fail("a module of PyTorch's was called"))
    assert len(modules) == 2
    block(tokens())
    assert {SHARED0, SHARED1} <= set(tasks_of(layers[0]))
    assert layers[0].stats[0].shared_tiles > 0


def test_zero_choices_send_nothing(layers):
    block = first_block("longcat_flash")
    x = tokens()
    _, _, idx = block.router(x.reshape(-1, 48))
    zeros = int((idx >= 8).sum())
    assert 0 < zeros < idx.numel()
    block(x)
    stats = layers[0].stats[0]
    assert stats.zero_choices == zeros and stats.sent_rows == idx.numel() - zeros
    assert sum(stats.rows_per_expert) == idx.numel() - zeros


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text", "mixtral", "lfm2_moe"])
def test_returns_what_the_public_block_does(family):
    model = make_model(family)
    name = replace_moe_blocks(model)[0]
    ours, eager = model.get_submodule(name)(tokens()), make_model(family).get_submodule(name)(tokens())
    assert type(ours) is type(eager)
    if isinstance(ours, tuple):
        assert len(ours) == len(eager) and ours[1] is None  # the router's scores, which the layer does not show
        ours, eager = ours[0], eager[0]
    assert ours.shape == eager.shape and ours.dtype == eager.dtype


def test_a_table_of_token_ids_needs_them():
    model = make_model("deepseek_v4")
    hashed, chosen = map(model.get_submodule, replace_moe_blocks(model))
    with pytest.raises(ValueError, match=r"input_ids must be given, .* got None"):
        hashed(tokens())
    ids = torch.randint(1, 199, (2, 19), generator=torch.Generator().manual_seed(6))
    expected = make_model("deepseek_v4").model.layers[0].mlp(tokens(), input_ids=ids)
    assert torch.allclose(hashed(tokens(), input_ids=ids), expected, atol=1e-5)
    assert torch.equal(chosen(tokens(), input_ids=ids), chosen(tokens()))


def make_block(family, *more, **sizes):
    """A public block, whose weights do not matter, and its model's config."""
    module, name = read_family(family).block.split(".")
    kind = CONFIG_MAPPING[read_family(family).model_type]
    config = kind(**{key: value for key, value in sizes.items() if key in kind().to_dict()})
    block = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), name)
    return block(config, *more), config.to_dict()


SMALL = dict(hidden_size=16, d_model=16, intermediate_size=8, moe_intermediate_size=8, d_ff=8, num_experts=4,
             n_routed_experts=4, moe_shared_expert_intermediate_size=8)  # fmt: skip


@pytest.mark.parametrize(
    ("family", "more", "own", "words"),
    [
        ("nllb_moe", [8], {}, "NllbMoeSparseMLP .*outside of the layer it has everything"),
        ("switch_transformers", [], {}, "SwitchTransformersSparseMLP .*outside of the layer it has capacity"),
        ("nemotron_h", [], dict(moe_latent_size=8), "NemotronHMoE .*outside of the layer it has projections"),
        ("zaya", [0], {}, "ZayaSparseMoeBlock .*outside of the layer it has the router"),
        (
            "cohere2_moe",
            [],
            dict(shared_expert_combination_strategy="average", num_shared_experts=2),
            "Cohere2MoeSparseMoeBlock .*averag",
        ),
    ],
)
def test_refuses_by_name(family, more, own, words):
    block, model = make_block(family, *more, **SMALL | own)
    with pytest.raises(NotImplementedError, match=words):
        adapter_for(block, model, 0)


def test_refuses_what_is_no_model():
    with pytest.raises(ValueError, match=r"model must have a block of a family .*got Linear"):
        replace_moe_blocks(torch.nn.Linear(3, 3))
    model = make_model("mixtral")
    with pytest.raises(ValueError, match=r"model must have a config of transformers, got MixtralSparseMoeBlock"):
        replace_moe_blocks(model.model.layers[0].mlp)
    with pytest.raises(ValueError, match="own"):
        replace_moe_blocks(model, own="both")
    with pytest.raises(ValueError, match=r"own must be 'parameters', because experts.gate_up_proj of LongcatFlashMoE"):
        replace_moe_blocks(make_model("longcat_flash"), own="packed")
