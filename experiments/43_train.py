"""Question: do transformers models learn the same with their MoE blocks computed by FlashMoE, on any number of ranks?

Command:  python experiments/43_train.py [--models mixtral,qwen3_moe] [--steps 200] [--plot losses.png]
          mpirun -n 2 python -m mpi4py experiments/43_train.py
          mpirun -n 4 python -m mpi4py experiments/43_train.py
Expected: `off10`, the largest distance of a loss from eager's in the first ten steps, below 1e-4; and one `bits` per
          model, whatever the number of ranks. Some minutes on two cores.

Models of random weights (seed 0) learn bytes of the documentation inside Python's standard library. A step has 4
sequences, each a micro-batch of its own on any number of ranks, whose gradients are added in the order of sequences:
experts' by fused_accumulation, all others' by sum_replicated_gradients. Nothing is dropped. So a step's bits do not
depend on the number of ranks: `bits` begins a SHA-256 of all parameters after `steps` steps. Losses have the models'
own part of router logits. `first` and `last` are means of ten losses.

On one rank eager runs, too, and once more in float64: for trainings that differ in rounding grow apart, as soon as it
changes one choice of an expert, and `off`, the largest distance in all steps, says little without that of eager64.
"""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import importlib.util
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import Row, leave, machine, parser_of, program, ranks, show, store

from flashmoe_numba.commands.flags import integer
from flashmoe_numba.commands.outputs import check_outputs

BATCH = 4  # sequences of a step
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", dict(num_local_experts=8, num_experts_per_tok=2, router_jitter_noise=0.0)),
    "qwen3_moe": ("Qwen3MoeConfig", dict(num_experts=16, num_experts_per_tok=4, norm_topk_prob=True)),
}
SIZES = dict(vocab_size=256, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0)
COLUMNS = {
    "model": "",
    "blocks": "",
    "ranks": "d",
    "steps": "d",
    "first": ".4f",
    "last": ".4f",
    "off10": ".1e",
    "off": ".1e",
}
COLUMNS |= {"bits": "", "s": ".0f"}
OFF = 1e-4
PACKAGES = ("numpy", "numba", "torch", "transformers")


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(MODELS), metavar="NAMES")
    parser.add_argument("--steps", type=integer(1), default=200, metavar="N", help="of the optimizer [200]")
    parser.add_argument("--plot", metavar="FILE", help="draw the losses of all steps as PNG")
    args = parser.parse_args()
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            leave(f"{name} is not installed: pip install 'flashmoe-numba[conformance]'", args)
    check_outputs({"--plot": args.plot})
    rank_idx, num_ranks, among = ranks()
    if BATCH % num_ranks:
        leave(f"a step has {BATCH} sequences, which {num_ranks} ranks cannot share evenly", args)
    rows = [row for name in args.models for row in rows_of(name, args, rank_idx, num_ranks, among)]
    if rank_idx == 0:
        show(rows, COLUMNS)
        store([row | machine() | program(PACKAGES) for row in rows], args.json)
        if args.plot:
            draw(rows, args.plot)
    return 0 if all(row["off10"] <= OFF for row in rows) else 1


def rows_of(name: str, args: argparse.Namespace, rank_idx: int, num_ranks: int, among: dict[str, Any]) -> list[Row]:
    """Of eager, on one rank, and of ours."""
    import torch

    from flashmoe_numba.torch import replace_moe_blocks

    torch.set_num_threads(1)  # PyTorch's sums depend on it
    steps = 3 if args.smoke else args.steps
    eager, batches = make_model(name, args.smoke), make_batches(steps, 32 if args.smoke else 128)
    ours = copy.deepcopy(eager)
    replace_moe_blocks(ours, train=True, fused_accumulation=True, **among)
    alone = {} if among else {"eager": eager, "eager64": copy.deepcopy(eager).double()}
    rows: list[Row] = []
    for blocks, model in {**alone, "flashmoe": ours}.items():
        began = time.perf_counter()
        losses = learn(model, batches, rank_idx, num_ranks, among)
        offs = [abs(a - b) for a, b in zip(losses, rows[0]["losses"] if rows else losses, strict=True)]
        row = dict(model=name, blocks=blocks, ranks=num_ranks, steps=steps, losses=losses)
        row |= dict(off10=max(offs[:10]), off=max(offs), first=_mean(losses[:10]), last=_mean(losses[-10:]))
        row |= dict(s=time.perf_counter() - began, bits=bits_of(model, rank_idx, num_ranks, among))
        rows.append(row)
    return rows


def learn(model: Any, batches: Any, rank_idx: int, num_ranks: int, among: dict[str, Any]) -> list[float]:
    """The loss of every step, of all ranks' sequences."""
    import torch

    from flashmoe_numba.torch import sum_replicated_gradients

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for batch in batches:
        own = []
        for begin in range(0, BATCH, num_ranks):
            ids = batch[begin + rank_idx : begin + rank_idx + 1]
            loss = model(ids, labels=ids, output_router_logits=True).loss
            (loss / BATCH).backward()
            if among:
                sum_replicated_gradients(model, more=begin + num_ranks < BATCH, **among)
            own.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(_mean([loss for of_rank in gather(own, num_ranks, among) for loss in of_rank]))
    return losses


def bits_of(model: Any, rank_idx: int, num_ranks: int, among: dict[str, Any]) -> str:
    """The beginning of a hash of all parameters: each rank has its own experts', of which others have old copies."""
    whole = hashlib.sha256()
    for name, parameter in model.named_parameters():
        array = parameter.detach().numpy()
        if ".experts." in name:
            share = len(array) // num_ranks
            own = [hashlib.sha256(expert.tobytes()).digest() for expert in array[share * rank_idx :][:share]]
            digests = [digest for of_rank in gather(own, num_ranks, among) for digest in of_rank]
        else:
            digests = [array.tobytes()]
        for digest in digests:
            whole.update(digest)
    return whole.hexdigest()[:16]


def gather(own: Any, num_ranks: int, among: dict[str, Any]) -> list[Any]:
    """What every rank has."""
    if "comm" in among:
        found: list[Any] = among["comm"].allgather(own)
        return found
    if not among:
        return [own]
    import torch.distributed as dist

    everybody: list[Any] = [None] * num_ranks
    dist.all_gather_object(everybody, own)
    return everybody


def make_batches(steps: int, length: int) -> Any:
    """`[steps, BATCH, length]`: pieces of the documentation, in an order that is the same everywhere."""
    import torch

    text = torch.frombuffer(bytearray("\n\n".join(docstrings()).encode()), dtype=torch.uint8).long()
    pieces = text[: len(text) // length * length].reshape(-1, length)
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(1))
    wanted = torch.arange(steps * BATCH) % len(pieces)
    return pieces[order[wanted]].reshape(steps, BATCH, length)


def docstrings() -> Iterator[str]:
    """Of modules of the standard library, their classes and functions; nothing is imported."""
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (said := ast.get_docstring(node)):
                yield said


def make_model(name: str, small: bool) -> Any:
    import torch
    import transformers

    config_name, kind = MODELS[name]
    sizes = dict(hidden_size=32, intermediate_size=24, num_hidden_layers=2, head_dim=8)
    if not small:
        sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16)
    config = getattr(transformers, config_name)(**SIZES, **sizes, **kind)
    if hasattr(config, "moe_intermediate_size"):
        config.moe_intermediate_size = sizes["intermediate_size"]
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").train()


def draw(rows: list[Row], file: str) -> None:
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(5 * len(names), 3.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False, sharey=True)[0], names, strict=True):
        for row, style in zip([row for row in rows if row["model"] == name], ("-", ":", "--"), strict=False):
            axes.plot(row["losses"], style, label=f"{row['blocks']}, {row['ranks']} rank{'s' * (row['ranks'] > 1)}")
        axes.set(title=name, xlabel="step", ylabel="loss")
        axes.legend()
    figure.savefig(file, dpi=150)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    sys.exit(main())
