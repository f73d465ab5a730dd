"""Checkpoints that transformers itself writes: what we read from the files is what its blocks have in memory.

Tiny models with random weights, saved in many small files. Needs PyTorch and transformers; without them it is skipped.
"""

import json
import re

import numpy as np
import pytest

from flashmoe_numba.checkpoints import Checkpoint, from_state_dict
from reference.families import read_family

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.timeout(300)]

# Words of many configs; each takes those it knows.
TINY = dict(
    vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    max_position_embeddings=64, intermediate_size=24, moe_intermediate_size=12, num_experts=4, num_local_experts=4,
    n_routed_experts=4, moe_num_experts=4, num_experts_per_tok=2, moe_topk=2, moe_k=2, n_group=1, topk_group=1,
    first_k_dense_replace=0, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    shared_expert_intermediate_size=8, n_shared_experts=1, moe_num_shared_experts=1, num_shared_experts=1,
    moe_layer_start_index=0, num_dense_layers=0, pad_token_id=0,
)  # fmt: skip
MAMBA = dict(attn_layer_period=1, attn_layer_offset=0, use_mamba_kernels=False, mamba_d_state=4, mamba_dt_rank=4)
FAMILIES = {  # with what a config must have besides
    "afmoe": {}, "aria": {}, "deepseek_v2": {}, "deepseek_v3": {}, "deepseek_v4_hash": {}, "ernie4_5_moe": {},
    "exaone_moe": {}, "gpt_oss": {}, "granitemoe": {}, "hunyuan_v1_moe": {}, "hy_v3": {}, "hy_v4": {},
    "jamba": dict(expert_layer_period=1, expert_layer_offset=0, **MAMBA), "jetmoe": {}, "kimi_linear": {},
    "kolibri1": {}, "laguna": {}, "lara_mini": {}, "lfm2_moe": dict(layer_types=["full_attention"] * 2),
    "llama4": dict(intermediate_size_mlp=24, interleave_moe_layer_step=1, no_rope_layers=[1, 1]),
    "minimax_m2": dict(rotary_dim=4), "minimax_m3_vl": {}, "mistral_large4": {}, "mixtral": {}, "nemotron_h": {},
    "openai_privacy_filter": {}, "phimoe": {}, "qwen2_moe": {}, "qwen3_moe": {}, "qwen3_next": {},
}  # fmt: skip


def make_model(family):
    """A tiny model, and one of its blocks with the index of its layer."""
    config_class = transformers.CONFIG_MAPPING[read_family(family).model_type]
    known = config_class()
    config = config_class(**{name: size for name, size in TINY.items() if hasattr(known, name)} | FAMILIES[family])
    torch.manual_seed(0)
    try:
        model = transformers.AutoModelForCausalLM.from_config(config)
    except ValueError:  # has no head for text
        model = transformers.AutoModel.from_config(config)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data.normal_(0, 0.3)
    block_class = read_family(family).block.split(".")[1]
    path, block = [item for item in model.named_modules() if type(item[1]).__name__ == block_class][-1]
    return model, block, int(re.search(r"\.(\d+)(\.|$)", path)[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_files_have_what_the_block_has(tmp_path, family, dtype):
    model, block, layer = make_model(family)
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    saved = json.loads((tmp_path / "config.json").read_text())
    in_memory, wanted = from_state_dict(saved, block.state_dict(), num_tokens=4, layer=layer, family=family)
    with Checkpoint(tmp_path, family=family) as checkpoint:
        assert layer in checkpoint.layers
        config, weights = checkpoint.load(layer, num_tokens=4)
        assert config == in_memory and config.dtype == dtype
        for name, value in vars(wanted).items():
            got = getattr(weights, name)
            assert np.array_equal(got, value) if isinstance(value, np.ndarray) else got == value, name
        ranks = [checkpoint.load(layer, num_tokens=4, num_ranks=2, rank_idx=rank_idx)[1] for rank_idx in range(2)]
        assert np.array_equal(np.concatenate([part.down_proj for part in ranks]), wanted.down_proj)


def test_mixtral_in_memory_is_what_its_code_says():
    """So that both ways to read a block are not wrong alike: this one is taken apart here, by transformers' source."""
    model, block, layer = make_model("mixtral")
    _, weights = from_state_dict(model.config.to_dict(), block.state_dict(), num_tokens=4, layer=layer)
    gate, up = block.experts.gate_up_proj.detach().chunk(2, dim=1)
    assert np.array_equal(weights.gate_proj, gate.numpy()) and np.array_equal(weights.up_proj, up.numpy())
    assert np.array_equal(weights.down_proj, block.experts.down_proj.detach().numpy())
    assert np.array_equal(weights.router, block.gate.weight.detach().numpy())


def test_mxfp4_is_what_transformers_makes_of_it():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    from flashmoe_numba.checkpoints.mxfp4 import dequantise

    rng = np.random.default_rng(0)
    blocks, scales = rng.integers(0, 256, (2, 6, 3, 16), np.uint8), rng.integers(100, 150, (2, 6, 3), np.uint8)
    theirs = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales))
    assert np.array_equal(dequantise(blocks, scales), theirs.float().numpy().swapaxes(1, 2))
