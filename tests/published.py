"""Blocks as the models of many families publish them: names and layouts written down here by hand, from the models' own
repositories, and nothing taken from reference/families. `BLOCKS` has for each family how true arrays become tensors.

True arrays are those of `Weights`, with a leading axis of experts where there is one.
"""

import numpy as np
from checkpoint_files import random, write_folder

from reference.families import read_family

E, H, F, K = 8, 21, 11, 2  # experts, hidden, ffn, top-k
LAYERS = (2, 3, 11)


def truth(family, seed=0, dtype="float32"):
    """Arrays for any family, which takes those it has."""
    rng, hidden, ffn, shared = np.random.default_rng(seed), H, F, SHARED.get(family, F)
    shapes = dict(
        router=(E, hidden), gate_proj=(E, ffn, hidden), up_proj=(E, ffn, hidden), down_proj=(E, hidden, ffn),
        gate_bias=(E, ffn), up_bias=(E, ffn), down_bias=(E, hidden), router_bias=(E,), selection_bias=(E,),
        expert_scale=(E,), shared_gate_weight=(hidden,),
        shared_gate_proj=(shared, hidden), shared_up_proj=(shared, hidden), shared_down_proj=(hidden, shared),
    )  # fmt: skip
    return {name: random(rng, *shape, dtype=dtype) for name, shape in shapes.items()}


def T(array):
    return np.swapaxes(array, -1, -2)


def split(gate, up):
    """Gate above up."""
    return np.concatenate([gate, up], axis=1)


def in_turn(gate, up):
    """A row of gate, a row of up."""
    return np.stack([gate, up], axis=2).reshape(len(gate), -1, *gate.shape[2:])


def each(t, gate="gate_proj", up="up_proj", down="down_proj", experts="experts"):
    """A tensor for each expert."""
    names = {gate: t["gate_proj"], up: t["up_proj"], down: t["down_proj"]}
    return {f"{experts}.{e}.{name}.weight": array[e] for name, array in names.items() for e in range(E)}


def w123(t):
    return each(t, "w1", "w3", "w2")


def plain(t):
    """Per expert, not gated."""
    names = {"up_proj": t["up_proj"], "down_proj": t["down_proj"]}
    return {f"experts.{e}.{name}.weight": array[e] for name, array in names.items() for e in range(E)}


def shared(place, weighed=False, gate=True):
    """What the shared expert's arrays are called; the row by which it is weighed is a matrix."""
    matrices = ["up_proj", "down_proj", *(["gate_proj"] if gate else [])]
    names = {f"shared_{name}": f"{place}.{name}.weight" for name in matrices}
    return names | ({"shared_gate_weight": f"{place}_gate.weight"} if weighed else {})


def fused(t):
    return {"experts.gate_up_proj": split(t["gate_proj"], t["up_proj"]), "experts.down_proj": t["down_proj"]}


def transposed(t):
    return {"experts.gate_up_proj": T(split(t["gate_proj"], t["up_proj"])), "experts.down_proj": T(t["down_proj"])}


def linears(t):
    return {"input_linear.weight": split(t["gate_proj"], t["up_proj"]), "output_linear.weight": t["down_proj"]}


def dbrx(t):
    rows = {"w1": t["gate_proj"], "v1": t["up_proj"], "w2": T(t["down_proj"])}
    return {f"experts.mlp.{name}": array.reshape(-1, array.shape[-1]) for name, array in rows.items()}


def gpt_oss(t):
    return {
        "experts.gate_up_proj": T(in_turn(t["gate_proj"], t["up_proj"])),
        "experts.gate_up_proj_bias": in_turn(t["gate_bias"], t["up_bias"]),
        "experts.down_proj": T(t["down_proj"]),
        "experts.down_proj_bias": t["down_bias"],
    }


def biased(t):
    biases = {"experts.gate_up_proj_bias": split(t["gate_bias"], t["up_bias"])}
    return transposed(t) | biases | {"experts.down_proj_bias": t["down_bias"]}


def aria(t):
    fused = transposed(t)
    return {"experts.fc1.weight": fused["experts.gate_up_proj"], "experts.fc2.weight": fused["experts.down_proj"]}


def step(t):
    """All experts' tensors, one for each matrix."""
    return {f"moe.{name}.weight": t[name] for name in ("gate_proj", "up_proj", "down_proj")}


MLP, SPARSE, FORWARD = "mlp", "block_sparse_moe", "feed_forward"
QWEN = dict(hidden_size=H, moe_intermediate_size=F, num_experts=E, num_experts_per_tok=K)
PLAIN = dict(hidden_size=H, intermediate_size=F, num_local_experts=E, num_experts_per_tok=K)
DEEP = dict(hidden_size=H, moe_intermediate_size=F, intermediate_size=99, n_routed_experts=E, num_experts_per_tok=K)
E_SCORE = "gate.e_score_correction_bias"
# family: (prefix, config, router, the tensors of its experts, and those of what it has besides)
BLOCKS = {
    "mixtral": (f"model.layers.{{}}.{SPARSE}.", PLAIN, "gate.weight", w123, {}),
    "phimoe": (f"model.layers.{{}}.{SPARSE}.", PLAIN, "gate.weight", w123, {}),
    "qwen3_moe": (f"model.layers.{{}}.{MLP}.", QWEN, "gate.weight", each, {}),
    "olmoe": (f"model.layers.{{}}.{MLP}.", PLAIN, "gate.weight", each, {}),
    "jamba": (f"model.layers.{{}}.{FORWARD}.", PLAIN, "router.weight", each, {}),
    "lfm2_moe": (f"model.layers.{{}}.{FORWARD}.", QWEN, "gate.weight", w123, {"selection_bias": "expert_bias"}),
    "minimax_m2": (
        f"model.layers.{{}}.{SPARSE}.", PLAIN, "gate.weight", w123, {"selection_bias": "e_score_correction_bias"}),
    "mimo_v2_flash": (f"model.layers.{{}}.{MLP}.", DEEP, "gate.weight", each, {"selection_bias": E_SCORE}),
    "granitemoe": (f"model.layers.{{}}.{SPARSE}.", PLAIN, "router.layer.weight", linears, {}),
    "dbrx": (
        "transformer.blocks.{}.ffn.", dict(d_model=H, ffn_hidden_size=F, moe_num_experts=E, moe_top_k=K),
        "router.layer.weight", dbrx, {}),
    "gpt_oss": (f"model.layers.{{}}.{MLP}.", PLAIN, "router.weight", gpt_oss, {"router_bias": "router.bias"}),
    "openai_privacy_filter": (
        f"model.layers.{{}}.{MLP}.", PLAIN, "router.weight", biased, {"router_bias": "router.bias"}),
    "qwen3_vl_moe": (f"model.language_model.layers.{{}}.{MLP}.", QWEN, "gate.weight", transposed, {}),
    "nemotron_h": (
        "backbone.layers.{}.mixer.", dict(DEEP, moe_shared_expert_intermediate_size=7), "gate.weight", plain,
        {"selection_bias": E_SCORE, **shared("shared_experts", gate=False)}),
    "gemma4": (
        "model.language_model.layers.{}.", dict(QWEN, top_k_experts=K), "router.proj.weight", fused,
        {"expert_scale": "router.per_expert_scale"}),
    "flex_olmo": (f"model.layers.{{}}.{MLP}.", PLAIN, "gate.weight", each, {}),
}  # fmt: skip
BLOCKS |= {
    "deepseek_v3": (
        f"model.layers.{{}}.{MLP}.", dict(DEEP, n_shared_experts=1), "gate.weight", each,
        {"selection_bias": E_SCORE, **shared("shared_experts")}),
    "qwen2_moe": (
        f"model.layers.{{}}.{MLP}.", dict(QWEN, shared_expert_intermediate_size=7), "gate.weight", each,
        shared("shared_expert", weighed=True)),
    "llama4": (
        f"language_model.model.layers.{{}}.{FORWARD}.", PLAIN, "router.weight", transposed, shared("shared_expert")),
    "aria": (
        f"language_model.model.layers.{{}}.{MLP}.",
        dict(hidden_size=H, intermediate_size=F, moe_num_experts=E, moe_topk=K, moe_num_shared_experts=2),
        "router.weight", aria, shared("shared_experts")),
    "hunyuan_v1_moe": (f"model.layers.{{}}.{MLP}.", PLAIN, "gate.wg.weight", each, shared("shared_mlp")),
    "ernie4_5_moe": (
        f"model.layers.{{}}.{MLP}.",
        dict(hidden_size=H, moe_intermediate_size=F, moe_num_experts=E, moe_k=K, moe_num_shared_experts=2),
        "gate.weight", each, {"selection_bias": "moe_statics.e_score_correction_bias", **shared("shared_experts")}),
    "kimi_linear": (
        f"model.layers.{{}}.{SPARSE}.", dict(QWEN, num_shared_experts=1), "gate.weight", w123,
        {"selection_bias": E_SCORE, **shared("shared_experts")}),
    "step3p7": (
        "model.layers.{}.", dict(DEEP, share_expert_dim=5), "moe.gate.weight", step,
        {"selection_bias": "moe.router_bias", **shared("share_expert")}),
}  # fmt: skip
SHARED = {
    "qwen2_moe": 7,
    "aria": 2 * F,
    "ernie4_5_moe": 2 * F,
    "kimi_linear": F,
    "step3p7": 5,
    "nemotron_h": 7,
}  # widths
NOT_GATED = ("nemotron_h",)
BIASED = ("gpt_oss", "openai_privacy_filter")


def tensors_of(family, layers, dtype="float32"):
    """The tensors of some layers: for each its own true arrays, whose seed is its index."""
    prefix, _, router, experts, others = BLOCKS[family]
    found = {}
    for layer in layers:
        t = truth(family, layer, dtype)
        block = {router: t["router"], **experts(t), **{name: _as_row(name, t[array]) for array, name in others.items()}}
        found |= {prefix.format(layer) + name: tensor for name, tensor in block.items()}
    return found


def _as_row(name, array):
    """Vectors that are stored as a matrix of one row."""
    return array[None] if name.endswith(("shared_expert_gate.weight", "moe_statics.e_score_correction_bias")) else array


def arrays_of(family):
    """Names of the arrays that a family's layer has."""
    matrices = ["router", "up_proj", "down_proj", *([] if family in NOT_GATED else ["gate_proj"])]
    return [*matrices, *BLOCKS[family][4], *(["gate_bias", "up_bias", "down_bias"] if family in BIASED else [])]


def make_folder(path, family, num_files=5, dtype="float32", **more):
    """A checkpoint with three layers in several files, and other tensors."""
    tensors = {"model.embed_tokens.weight": np.ones((3, H), np.float32), **tensors_of(family, LAYERS, dtype=dtype)}
    config = {"model_type": read_family(family).model_type, **BLOCKS[family][1], **more}
    return write_folder(path, config, tensors, num_files)
