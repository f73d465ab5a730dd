"""Experts implementations: layouts, what is refused, saving to disk, and who else may run."""

import copy
import importlib

import pytest
import torch
from tiny_models import generated, make_ids, make_model
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.activations import ReLUSquaredActivation
from transformers.integrations.moe import use_experts_implementation

from flashmoe_numba.torch import register, replace_moe_blocks
from flashmoe_numba.torch.experts import flashmoe_experts
from reference.families import read_family

E, F, H, N, K = 5, 7, 9, 13, 2


class Config:
    _experts_implementation = "grouped_mm"


def make_experts(has_gate=True, has_bias=False, is_transposed=False, is_concatenated=True, act_fn=None):
    """Decorated experts with random weights."""

    @use_experts_implementation(
        has_gate=has_gate, has_bias=has_bias, is_transposed=is_transposed, is_concatenated=is_concatenated
    )
    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts, self.act_fn = E, act_fn or nn.SiLU()
            ups = "gate_up_proj" if has_gate else "up_proj"
            width = 2 * F if has_gate else F
            for name, rows, depth in ((ups, width, H), ("down_proj", H, F)):
                shape = (E, depth, rows) if is_transposed else (E, rows, depth)
                self.register_parameter(name, nn.Parameter(torch.randn(shape), requires_grad=False))
                if has_bias:
                    bias = nn.Parameter(torch.randn(E, rows), requires_grad=False)
                    self.register_parameter(f"{name}_bias", bias)

        def forward(self, hidden_states, top_k_index, top_k_weights):
            raise NotImplementedError

    return Experts(Config())


def eager_sum(experts, x, idx, factors):
    """Expert by expert, in float64."""
    total = torch.zeros(N, H, dtype=torch.float64)

    def matrix(name):
        found = getattr(experts, name).double()
        return found.mT if experts.is_transposed else found

    def bias(name):
        return getattr(experts, f"{name}_bias").double() if experts.has_bias else torch.zeros(E, 1)

    for token, (experts_of, factors_of) in enumerate(zip(idx.tolist(), factors, strict=True)):
        for e, factor in zip(experts_of, factors_of, strict=True):
            ups = "gate_up_proj" if experts.has_gate else "up_proj"
            up = matrix(ups)[e] @ x[token].double() + bias(ups)[e]
            if experts.has_gate:
                gate, up = (up[:F], up[F:]) if experts.is_concatenated else (up[::2], up[1::2])
                row = experts.act_fn(gate) * up
            else:
                row = experts.act_fn(up)
            total[token] += factor.double() * (matrix("down_proj")[e] @ row + bias("down_proj")[e])
    return total


def make_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    idx = torch.rand(N, E, generator=generator).argsort(1)[:, :K]
    return torch.randn(N, H, generator=generator), idx, torch.rand(N, K, generator=generator)


@pytest.mark.parametrize("has_gate", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("is_transposed", [True, False])
@pytest.mark.parametrize("is_concatenated", [True, False])
def test_every_layout(has_gate, has_bias, is_transposed, is_concatenated):
    torch.manual_seed(0)
    experts, batch = make_experts(has_gate, has_bias, is_transposed, is_concatenated), make_batch()
    expected = eager_sum(experts, *batch)
    error = (flashmoe_experts(experts, *batch).double() - expected).abs().max() / expected.abs().max()
    assert error < 1e-6


@pytest.mark.parametrize(
    "act_fn",
    [nn.SiLU(), nn.ReLU(), nn.GELU(), nn.GELU("tanh"), ReLUSquaredActivation(), nn.functional.silu, nn.Identity()],
)
def test_every_activation(act_fn):
    torch.manual_seed(0)
    experts, batch = make_experts(act_fn=act_fn), make_batch()
    expected = eager_sum(experts, *batch)
    error = (flashmoe_experts(experts, *batch).double() - expected).abs().max() / expected.abs().max()
    assert error < 1e-6


@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_experts_of_another_type_than_new_tensors_have(default, dtype):
    """A router that nobody has is none of PyTorch's new tensors."""
    torch.manual_seed(0)
    experts, (x, idx, factors) = make_experts().to(dtype), make_batch()
    expected = eager_sum(experts, x.to(dtype), idx, factors)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        y = flashmoe_experts(experts, x.to(dtype), idx, factors)
    finally:
        torch.set_default_dtype(before)
    error = (y.double() - expected).abs().max() / expected.abs().max()
    assert y.dtype == dtype and error < {torch.bfloat16: 0.02}.get(dtype, 1e-6)


def test_no_choice_adds_nothing():
    """Frameworks pad with the number of experts and with -1."""
    experts, (x, idx, factors) = make_experts(), make_batch()
    padded = idx.clone()
    padded[::2, 0], padded[1::3, 1] = E, -1
    expected = eager_sum(experts, x, idx, factors * ((padded >= 0) & (padded < E)))
    y = flashmoe_experts(experts, x, padded, factors)
    assert (y.double() - expected).abs().max() < 1e-6 * expected.abs().max()


OWN_GATES = {  # module: the class of its experts; limits are such that they bite
    "beam": "BeamExperts",
    "deepseek_v4": "DeepseekV4Experts",
    "glm5_next": "Glm5NextTextExperts",
    "gpt_oss": "GptOssExperts",
    "hy_v4": "HYV4Experts",
    "inkling2": "Inkling2Experts",
    "minimax_m3_vl": "MiniMaxM3VLExperts",
    "openai_privacy_filter": "OpenAIPrivacyFilterExperts",
}


def public_experts(module):
    """Experts as transformers has them, with random weights."""
    code = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    kind = CONFIG_MAPPING[read_family(module).model_type]
    there, mapped = kind().to_dict(), kind.attribute_map
    sizes = dict(hidden_size=H, intermediate_size=F, moe_intermediate_size=F, num_experts=E, num_local_experts=E)
    sizes |= dict(n_routed_experts=E, swiglu_limit=0.75, mlp_gate_softcap=1.5, mlp_up_softcap=1.25)
    config = kind(**{name: size for name, size in sizes.items() if name in there and name not in mapped})
    config._experts_implementation = "eager"
    experts = getattr(code, OWN_GATES[module])(config).requires_grad_(False)
    for parameter in experts.parameters():
        parameter.normal_()
    return experts


@pytest.mark.parametrize("module", OWN_GATES)
def test_gates_of_their_own(module):
    """By the family's file, against the public code in float64."""
    torch.manual_seed(0)
    experts, (x, idx, factors) = public_experts(module), make_batch()
    y = flashmoe_experts(experts, x, idx, factors)
    expected = experts.double()(x.double(), idx, factors.double())
    assert (y.double() - expected).abs().max() < 1e-6 * expected.abs().max()


def test_refuses_what_experts_cannot_say():
    for change, words in (
        (dict(has_post_expert_norm=True), "normalises each expert's result"),
        (dict(_is_expert_parallel=True), "spread over ranks by transformers .without ep_implementation"),
        (dict(act_fn=nn.Tanh()), "has the activation Tanh"),
    ):
        experts = make_experts()
        vars(experts).update(change)
        experts._modules.update({name: m for name, m in change.items() if isinstance(m, nn.Module)})
        with pytest.raises(NotImplementedError, match=words):
            flashmoe_experts(experts, *make_batch())
    experts = make_experts()
    type(experts)._apply_gate = lambda self, gate_up: gate_up[..., :F]
    with pytest.raises(NotImplementedError, match=r"Experts has a gate of its own .* that no family's file describes"):
        flashmoe_experts(experts, *make_batch())


def test_refuses_gradients_of_a_model():
    register()
    model = make_model("mixtral").requires_grad_(True)
    model.set_experts_implementation("flashmoe")
    with pytest.raises(RuntimeError, match="make it with train=True"):
        model(make_ids())


def test_a_registered_model_compiles_into_one_graph():
    torch._dynamo.reset()
    register()
    model = make_model("qwen3_moe")
    model.set_experts_implementation("flashmoe")
    block = model.model.layers[0].mlp
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 8):
        x = torch.randn(1, tokens, 48)
        assert torch.equal(compiled(x), block(x))


def test_a_swapped_block_compiles_into_one_graph():
    torch._dynamo.reset()
    model = make_model("jetmoe")
    block = model.get_submodule(replace_moe_blocks(model)[0])
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 8):
        x = torch.randn(1, tokens, 48)
        assert torch.equal(compiled(x), block(x))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "qwen2_moe", "dbrx"])
def test_a_model_of_packed_weights_is_saved_as_it_was(family, tmp_path):
    plain, ids = make_model(family), make_ids()
    packed = copy.deepcopy(plain)
    replace_moe_blocks(packed, own="packed")
    assert any(parameter.is_meta for parameter in packed.parameters())
    expected = packed(ids).logits
    packed.save_pretrained(tmp_path / "packed")
    plain.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", experts_implementation="eager").eval()
    state, of_plain = again.state_dict(), plain.state_dict()
    assert state.keys() == of_plain.keys() and all(torch.equal(state[name], of_plain[name]) for name in state)
    assert torch.equal(packed(ids).logits, expected)
    assert torch.equal(generated(packed, ids), generated(plain, ids))
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("packed", "plain")]
    assert names[0] == names[1]
