"""Tiny models of public families with random weights, float32: a config makes them, nothing is downloaded."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

WORDS = dict(  # of many configs; each takes those that it has
    vocab_size=199, max_position_embeddings=128, pad_token_id=0, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, hidden_size=48, head_dim=12, intermediate_size=24, moe_intermediate_size=24,
    num_experts=8, num_local_experts=8, n_routed_experts=8, moe_num_experts=8, num_experts_per_tok=3, moe_topk=3,
    moe_k=3, n_group=2, topk_group=1, num_shared_experts=2, n_shared_experts=2, moe_num_shared_experts=2,
    shared_expert_intermediate_size=20, moe_shared_expert_intermediate_size=20, first_k_dense_replace=0,
    moe_layer_start_index=0, num_dense_layers=0, moe_norm_min=0.3, routed_scaling_factor=1.5,
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12,
)  # fmt: skip
MAMBA = dict(use_mamba_kernels=False, mamba_d_state=4, mamba_dt_rank=4)
OWN = {  # family: what its config has besides; a name of another value than in WORDS counts
    "aria_text": {},
    "axk1": dict(num_key_value_heads=4, head_dim=8),
    "dbrx": dict(
        d_model=48, n_heads=4, n_layers=2, max_seq_len=64, attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=1e4),
        ffn_config=dict(ffn_hidden_size=24, moe_num_experts=4, moe_top_k=2, hidden_size=48,
                        moe_normalize_expert_weights=2.0),
    ),
    "deepseek_v2": dict(num_key_value_heads=4, topk_method="group_limited_greedy"),
    "deepseek_v3": dict(num_key_value_heads=4, head_dim=8),
    "dots1": {},
    "ernie4_5_moe": {},
    "glm4_moe": dict(num_key_value_heads=4),
    "gpt_oss": dict(layer_types=["full_attention"] * 2, swiglu_limit=0.75),
    "granitemoe": {},
    "hunyuan_v1_moe": {},
    "jamba": dict(attn_layer_period=1, attn_layer_offset=0, expert_layer_period=1, expert_layer_offset=0, **MAMBA),
    "jetmoe": dict(kv_channels=12, num_local_experts=4, num_experts_per_tok=2),
    "lfm2_moe": dict(layer_types=["full_attention"] * 2),
    "llama4_text": dict(
        num_experts_per_tok=2, interleave_moe_layer_step=1, no_rope_layers=[1, 1], attention_chunk_size=128,
        intermediate_size_mlp=24,
    ),
    "longcat_flash": dict(
        num_layers=2, ffn_hidden_size=24, expert_ffn_hidden_size=24, zero_expert_num=4, num_key_value_heads=4,
        head_dim=8,
    ),
    "minimax_m2": dict(rotary_dim=4),
    "mixtral": dict(num_local_experts=6, num_experts_per_tok=2, intermediate_size=40),
    "nemotron_h": dict(layers_block_type=["attention", "moe"]),
    "olmoe": {},
    "phimoe": dict(num_experts_per_tok=2, router_jitter_noise=0.3),
    "qwen2_moe": {},
    "qwen3_moe": dict(norm_topk_prob=True),
    "deepseek_v4": dict(mlp_layer_types=["hash_moe", "moe"], swiglu_limit=0.75),
}  # fmt: skip


def make_model(family, seed=0, **changes):
    """A model in evaluation, whose experts matter: matrices have standard deviation 1 / sqrt(fan_in).

    `changes` are the config's.
    """
    kind = CONFIG_MAPPING[family]
    there, mapped = kind().to_dict(), getattr(kind, "attribute_map", {})
    words = {name: value for name, value in WORDS.items() if name in there and name not in mapped}
    config = kind(**words | OWN[family] | changes)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "bias" in name:  # which else are zeros
            tensor.normal_(0, 0.1, generator=generator)
        elif tensor.dim() > 1 and tensor.is_floating_point():
            tensor.normal_(0, tensor.shape[-1] ** -0.5, generator=generator)
        elif name.endswith("tid2eid"):  # a table from token ids to experts
            tensor.copy_(torch.rand(len(tensor), 8, generator=generator).argsort(1)[:, : tensor.shape[1]])
    return model


def make_ids(rows=2, length=17, seed=1):
    return torch.randint(1, 199, (rows, length), generator=torch.Generator().manual_seed(seed))


def generated(model, ids, new=6, **how):
    return model.generate(ids, max_new_tokens=new, do_sample=False, attention_mask=torch.ones_like(ids), **how)
