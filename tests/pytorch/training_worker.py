"""One rank of the tests in test_training_ranks.py: `training_worker.py LAUNCHER FOLDER`.

It leaves `rank0.txt` in the folder: what it found wrong, or "ok".
"""

import copy
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import torch
from cases import random_tokens, tiny_config
from ranks_worker import begin
from tiny_models import make_ids, make_model

from flashmoe_numba.heap.tensors import as_tensor
from flashmoe_numba.torch import MoE, register, replace_moe_blocks, sum_replicated_gradients
from reference import Weights

OF_EXPERTS = ("gate_proj", "up_proj", "down_proj", "gate_bias", "up_bias", "down_bias")


def modules(rank, size, among):
    """Experts and tokens have the bits of one rank with all tokens; the router's sum is made in the order of ranks."""
    config = tiny_config(num_ranks=size, num_experts=2 * size, num_tokens=6, shared_ffn=3)
    counts = [5 - of % 3 for of in range(size)]
    weights, alone = Weights.random(config, bias=True), replace(config, num_ranks=1, num_tokens=6 * size)
    xs = [as_tensor(x) for x in random_tokens(config, counts)]
    dys = [torch.randn(x.shape, generator=torch.Generator().manual_seed(5 + of)) for of, x in enumerate(xs)]

    one = MoE(alone, weights, train=True)
    whole = torch.cat(xs).requires_grad_()
    (one(whole) * torch.cat(dys)).sum().backward()
    expected = {name: parameter.grad for name, parameter in one.named_parameters()}
    parts = []
    for x, dy in zip(xs, dys, strict=True):
        one.zero_grad()
        (one(x) * dy).sum().backward()
        parts.append({name: parameter.grad.clone() for name, parameter in one.named_parameters()})

    first = 2 * rank
    for shard in (False, True):
        module = MoE(config, weights.shard(rank, size) if shard else weights, train=True, **among)
        x = xs[rank].clone().requires_grad_()
        (module(x) * dys[rank]).sum().backward()
        assert torch.equal(x.grad, whole.grad.split(counts)[rank]), "x"
        own = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
        sum_replicated_gradients(module, **among)
        for name, parameter in module.named_parameters():
            if name in OF_EXPERTS:
                assert torch.equal(parameter.grad, own[name]), name
                here = parameter.grad if shard else parameter.grad[first : first + 2]
                assert torch.equal(here, expected[name][first : first + 2]), name
                assert shard or parameter.grad.count_nonzero() == here.count_nonzero(), name
            else:
                assert torch.equal(own[name], parts[rank][name]), name
                total = parts[0][name].clone()
                for part in parts[1:]:
                    total += part[name]
                assert torch.equal(parameter.grad, total), name
        module.zero_grad()
        sum_replicated_gradients(module, **among)
        assert all(parameter.grad is None for parameter in module.parameters())


def micro_batches(rank, size, among):
    """A sequence each: with sums that go on, gradients have the bits of one rank."""
    changes = dict(num_local_experts=8)
    one = make_model("mixtral", **changes).requires_grad_(True)
    ours, named = copy.deepcopy(one), copy.deepcopy(one)
    sequences = [make_ids(1, 9, seed) for seed in range(4)]
    replace_moe_blocks(one, train=True, fused_accumulation=True)
    for ids in sequences:
        one(ids, labels=ids, output_router_logits=True).loss.backward()
    replace_moe_blocks(ours, train=True, fused_accumulation=True, **among)
    step(ours, sequences, rank, size, among)
    for (name, parameter), theirs in zip(ours.named_parameters(), one.parameters(), strict=True):
        share = slice(8 // size * rank, 8 // size * (rank + 1)) if ".experts." in name else slice(None)
        assert torch.equal(parameter.grad[share], theirs.grad[share]), name
    register(train=True, fused_accumulation=True, **among)
    named.set_experts_implementation("flashmoe")
    step(named, sequences, rank, size, among)
    for (name, parameter), theirs in zip(named.named_parameters(), one.parameters(), strict=True):
        share = slice(8 // size * rank, 8 // size * (rank + 1)) if ".experts." in name else slice(None)
        assert torch.allclose(parameter.grad[share], theirs.grad[share], rtol=1e-4, atol=1e-6), name


def step(model, sequences, rank, size, among):
    for first in range(0, len(sequences), size):
        ids = sequences[first + rank]
        model(ids, labels=ids, output_router_logits=True).loss.backward()
        sum_replicated_gradients(model, more=first + size < len(sequences), **among)


def main(launcher, folder):
    rank, size, among = begin(launcher)
    try:
        for scenario in (modules, micro_batches):
            scenario(rank, size, among)
            print(f"rank {rank}: {scenario.__name__}", flush=True)
        said = "ok"
    except BaseException:
        said = traceback.format_exc()
    Path(folder, f"rank{rank}.txt").write_text(said)
    if said != "ok":
        raise SystemExit(said)


if __name__ == "__main__":
    main(*sys.argv[1:])
