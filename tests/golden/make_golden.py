"""Run public blocks, tiny, and keep what they make of their tokens: needs torch and transformers.

    .venv/bin/python tests/golden/make_golden.py [CASE ...]

writes tests/golden/records/CASE.npz for all cases, or for those named.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from golden.blocks import VERSION, Block
from golden.record import RECORDS, Record
from golden.tensors import tokens

from reference.families import family_names, read_family

NOT_LAYERS = ("doge", "nllb_moe")  # their files say why
# Other values of the same options: (family, options of the model's config).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "axk2.no_groups": ("axk2", {"n_group": None, "topk_group": None}),
    "cohere2_moe.sigmoid": ("cohere2_moe", {"expert_selection_fn": "sigmoid"}),
    "cohere2_moe.sigmoid_plain": ("cohere2_moe", {"expert_selection_fn": "sigmoid", "norm_topk_prob": False}),
    "cohere2_moe.not_shared": ("cohere2_moe", {"num_shared_experts": 0}),
    "dbrx.sum": ("dbrx", {"ffn_config": {"ffn_hidden_size": 11, "moe_num_experts": 8, "moe_top_k": 2, "hidden_size": 21,
                                         "moe_normalize_expert_weights": 1.0}}),
    "deepseek_v2.greedy": ("deepseek_v2", {"topk_method": "greedy"}),
    "deepseek_v3.plain": ("deepseek_v3", {"n_group": 2, "topk_group": 1, "norm_topk_prob": False}),
    "deepseek_v4.sigmoid": ("deepseek_v4", {"scoring_func": "sigmoid"}),
    "flint.plain": ("flint", {"norm_topk_prob": False}),
    "kolibri1.plain": ("kolibri1", {"norm_topk_prob": False}),
    "laguna.no_cap": ("laguna", {"moe_router_logit_softcapping": 0.0}),
    "lfm2_moe.no_bias": ("lfm2_moe", {"use_expert_bias": False, "norm_topk_prob": False}),
    "llama4.top1": ("llama4", {"num_experts_per_tok": 1}),
    "longcat_flash.no_zero": ("longcat_flash", {"zero_expert_num": 0}),
    "mistral4.one_group": ("mistral4", {"n_group": 1, "topk_group": 1, "norm_topk_prob": False}),
    "mixtral.gelu": ("mixtral", {"hidden_act": "gelu", "num_experts_per_tok": 5}),
    "nemotron_h.groups": ("nemotron_h", {"n_group": 2, "topk_group": 1}),
    "phimoe.jitter": ("phimoe", {"router_jitter_noise": 0.1}),
    "qwen2_moe.plain": ("qwen2_moe", {"norm_topk_prob": False}),
    "qwen3_moe.relu": ("qwen3_moe", {"norm_topk_prob": False, "hidden_act": "relu", "num_experts_per_tok": 8}),
    "step3p7.no_limit": ("step3p7", {"swiglu_limits": None, "swiglu_limits_shared": None}),
}  # fmt: skip


# Other numbers, with which every word of the router is seen in the results.
SALTS = dict.fromkeys(("deepseek_v3.plain", "mistral4", "mistral_large4", "nemotron_h.groups"), "1")


def cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """By name: a family, and options of the model's config."""
    return {name: (name, {}) for name in family_names() if name not in NOT_LAYERS} | VARIANTS


def make(family: str, options: dict[str, Any], salt: str = "") -> Record:
    """One case, run in float64 and in float32."""
    block = Block(read_family(family), options)
    double, single = block.run("float64", salt), block.run("float32", salt)
    about = {"transformers": VERSION, "model": block.model, "shapes": block.shapes, "salt": salt}
    same = np.array_equal(double.x, tokens(*double.x.shape))
    return Record(
        family=family,
        about=json.dumps(about),
        rows=np.empty(0) if same else double.x,
        logits=np.empty(0) if double.logits is None else double.logits,
        topk_idx=double.topk_idx.astype(np.int8),
        topk_weights=double.topk_weights,
        y=double.y,
        y32=single.y.astype(np.float32),
    )


def main() -> None:
    """Write the records of the cases named on the command line, or of all."""
    RECORDS.mkdir(exist_ok=True)
    for name in sys.argv[1:] or cases():
        record = make(*cases()[name], salt=SALTS.get(name, ""))
        record.write(RECORDS / f"{name}.npz")
        print(name, record.y.shape, flush=True)


if __name__ == "__main__":
    main()
