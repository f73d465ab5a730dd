"""Tiny models of public families with random weights, float32: a config makes them, nothing is downloaded."""

import torch
import transformers

SIZES = dict(
    vocab_size=199, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, pad_token_id=0,
)  # fmt: skip
HEADS = dict(head_dim=12)
DBRX_FFN = dict(ffn_hidden_size=24, moe_num_experts=4, moe_top_k=2, hidden_size=48)
SIGMOID = dict(
    moe_intermediate_size=24, intermediate_size=40, n_routed_experts=8, num_experts_per_tok=3, n_group=2, topk_group=1,
    first_k_dense_replace=1, n_shared_experts=1,
)  # fmt: skip
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12)

CONFIGS = {  # family: (config class, its arguments)
    "mixtral": ("MixtralConfig", SIZES | HEADS | dict(intermediate_size=40, num_local_experts=6)),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        SIZES | HEADS | dict(moe_intermediate_size=24, num_experts=8, num_experts_per_tok=3, norm_topk_prob=True),
    ),
    "olmoe": ("OlmoeConfig", SIZES | dict(intermediate_size=24, num_experts=8, num_experts_per_tok=3)),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        SIZES
        | dict(moe_intermediate_size=24, shared_expert_intermediate_size=32, num_experts=8, num_experts_per_tok=3),
    ),
    "deepseek_v3": ("DeepseekV3Config", SIZES | LATENT | SIGMOID | dict(num_key_value_heads=4)),
    "glm4_moe": ("Glm4MoeConfig", SIZES | HEADS | SIGMOID),
    "dots1": ("Dots1Config", SIZES | HEADS | SIGMOID),
    "granitemoe": ("GraniteMoeConfig", SIZES | dict(intermediate_size=24, num_local_experts=6, num_experts_per_tok=2)),
    "phimoe": ("PhimoeConfig", SIZES | dict(intermediate_size=40, num_local_experts=6, num_experts_per_tok=2)),
    "jetmoe": (
        "JetMoeConfig",
        dict(vocab_size=199, hidden_size=48, num_hidden_layers=2, num_key_value_heads=2, kv_channels=12)
        | dict(intermediate_size=24, num_local_experts=4, num_experts_per_tok=2),
    ),
    "dbrx": (
        "DbrxConfig",
        dict(d_model=48, n_heads=4, n_layers=2, vocab_size=199, max_seq_len=64, ffn_config=DBRX_FFN)
        | dict(attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=1e4)),
    ),
}
REGISTERED = [name for name in CONFIGS if name not in ("jetmoe", "dbrx")]  # the others ignore experts_implementation
SWAPPED = ["mixtral", "qwen3_moe", "olmoe", "qwen2_moe", "jetmoe", "dbrx"]


def make_model(family, seed=0):
    """A model in evaluation, whose experts matter: matrices have standard deviation 1 / sqrt(fan_in)."""
    name, arguments = CONFIGS[family]
    config = getattr(transformers, name)(**arguments)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.requires_grad_(False).parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    return model


def make_ids(rows=2, length=17, seed=1):
    return torch.randint(1, 199, (rows, length), generator=torch.Generator().manual_seed(seed))


def generated(model, ids, new=6):
    return model.generate(ids, max_new_tokens=new, do_sample=False, attention_mask=torch.ones_like(ids))
