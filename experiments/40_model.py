"""Question: does a transformers model say the same with its MoE blocks computed by FlashMoE?

Command:  python experiments/40_model.py [--models mixtral,qwen3_moe] [--new 64]
          mpirun -n 2 python -m mpi4py experiments/40_model.py
          torchrun --standalone --nproc-per-node 2 experiments/40_model.py
Expected: every row `same` (greedy text, token for token as eager's), and `error` of the logits below 5e-7 of the
          largest. A minute on two cores.

Models are made from configs with random weights (seed 0); nothing is downloaded. `registered` is
experts_implementation="flashmoe", the model's own routers; `swapped` is replace_moe_blocks, routed in the kernel;
`packed` the same with weights in the kernel's order only. `text_s` is the time of the text, of one run: models this
small are slow in PyTorch's attention and in the calls between, so it says little of the layer.

With several ranks each has its own prompts, the longer the higher its rank, and packs its own experts only. Rows are
rank 0's; every rank judges its own, and its exit status says so.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from common import Row, leave, machine, parser_of, program, ranks, show, store

from flashmoe_numba.commands.flags import integer

SIZES = dict(vocab_size=1009, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", dict(num_local_experts=8, num_experts_per_tok=2)),
    "qwen3_moe": ("Qwen3MoeConfig", dict(num_experts=16, num_experts_per_tok=4, norm_topk_prob=True)),
}
COLUMNS = {"model": "", "ranks": "d", "blocks": "", "new": "d", "same": "", "error": ".1e"}
COLUMNS |= {"text_s": ".2f", "eager_s": ".2f"}
BOUND = 5e-7
PACKAGES = ("numpy", "numba", "torch", "transformers")


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(MODELS), metavar="NAMES")
    parser.add_argument("--new", type=integer(1), default=64, metavar="N", help="tokens to generate [64]")
    args = parser.parse_args()
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            leave(f"{name} is not installed: pip install 'flashmoe-numba[conformance]'", args)
    rank_idx, num_ranks, among = ranks()
    rows = [row | dict(ranks=num_ranks) for name in args.models for row in rows_of(name, args, rank_idx, among)]
    if rank_idx == 0:
        show(rows, COLUMNS)
        store([row | machine() | program(PACKAGES) for row in rows], args.json)
    return 0 if all(row["same"] and row["error"] <= BOUND for row in rows) else 1


def rows_of(name: str, args: argparse.Namespace, rank_idx: int, among: dict[str, Any]) -> list[Row]:
    """One for each way to compute the blocks."""
    import torch

    eager = make_model(name, args.smoke)
    length, generator = (9 if args.smoke else 100) + rank_idx, torch.Generator().manual_seed(1 + rank_idx)
    ids = torch.randint(1, 1009, (2, length), generator=generator)
    new = 5 if args.smoke else args.new
    logits, text, eager_s = said(eager, ids, new, {})
    rows = []
    for blocks, change in WAYS.items():
        model = copy.deepcopy(eager)
        change(model, **among)
        ours, ours_text, text_s = said(model, ids, new, among)
        error = float((ours - logits).abs().max() / logits.abs().max())
        row = dict(model=name, blocks=blocks, new=new, same=torch.equal(ours_text, text), error=error)
        rows.append(row | dict(text_s=text_s, eager_s=eager_s))
    return rows


def said(model: Any, ids: Any, new: int, among: dict[str, Any]) -> tuple[Any, Any, float]:
    """(logits of these tokens, the greedy text that follows, its seconds)."""
    import torch

    from flashmoe_numba.torch import join

    with torch.inference_mode(), join(**among) if among else nullcontext():
        logits = model(ids).logits
        began = time.perf_counter()
        text = model.generate(ids, max_new_tokens=new, do_sample=False, attention_mask=torch.ones_like(ids))
        return logits, text, time.perf_counter() - began


def make_model(name: str, small: bool) -> Any:
    import torch
    import transformers

    config_name, kind = MODELS[name]
    sizes = dict(hidden_size=32, intermediate_size=24, num_hidden_layers=2, head_dim=8)
    if not small:
        sizes = dict(hidden_size=256, intermediate_size=384, num_hidden_layers=4, head_dim=64)
    config = getattr(transformers, config_name)(**SIZES, **sizes, **kind)
    if hasattr(config, "moe_intermediate_size"):
        config.moe_intermediate_size = sizes["intermediate_size"]
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.requires_grad_(False).parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    return model


def _registered(model: Any, **among: Any) -> None:
    from flashmoe_numba.torch import register

    register(**among)
    model.set_experts_implementation("flashmoe")


def _swapped(model: Any, **among: Any) -> None:
    from flashmoe_numba.torch import replace_moe_blocks

    replace_moe_blocks(model, **among)


def _packed(model: Any, **among: Any) -> None:
    from flashmoe_numba.torch import replace_moe_blocks

    replace_moe_blocks(model, own="packed", **among)


WAYS: dict[str, Callable[..., None]] = {"registered": _registered, "swapped": _swapped, "packed": _packed}

if __name__ == "__main__":
    sys.exit(main())
