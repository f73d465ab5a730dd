"""One rank of the tests in test_ranks.py, under mpirun or torchrun: `ranks_worker.py LAUNCHER FOLDER SCENARIO...`.

It leaves `rank0.txt` in the folder: what it found wrong, or "ok".
"""

import copy
import gc
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from cases import random_tokens, tiny_config
from tiny_models import generated, make_ids, make_model
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from flashmoe_numba.heap.tensors import as_tensor
from flashmoe_numba.torch import MoE, join, register, release, replace_moe_blocks
from flashmoe_numba.torch.session import SESSION
from reference import Weights

CHANGES = {"mixtral": dict(num_local_experts=8), "qwen3_moe": {}}  # experts that 4 ranks can share


def begin(launcher):
    """(rank, number of ranks, what says so to this package) of this process."""
    if launcher == "mpirun":
        from mpi4py import MPI

        return MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size, dict(comm=MPI.COMM_WORLD)
    dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size(), dict(process_group=dist.group.WORLD)


def packed_bytes(alone):
    """Of the experts that this process has packed, of modules that it computes alone or with other ranks."""
    gc.collect()
    entries = [entry for entry in SESSION._entries.values() if (entry.shared.ranks is None) == alone]
    of_ranks = [experts for entry in entries for experts in entry.packed.of_ranks]
    return sum(experts.up.weights.nbytes + experts.down.weights.nbytes for experts in of_ranks)


def modules(rank, size, among):
    """Own tokens of each rank, in more calls of the layer than the others need, with weights of all experts or own."""
    config = tiny_config(num_ranks=size, num_experts=2 * size)
    alone, counts = replace(config, num_ranks=1), [3 + 6 * other for other in range(size)]  # 7 of them in a call
    x = as_tensor(random_tokens(replace(config, num_tokens=6 * size), counts)[rank])
    expected, expected_after = (MoE(alone, Weights.random(config, seed, bias=True))(x) for seed in (0, 1))
    for own in ("parameters", "packed"):
        for shard in (False, True):
            weights, after = (Weights.random(config, seed, bias=True) for seed in (0, 1))
            if shard:
                weights, after = (given.shard(rank, size) for given in (weights, after))
            module = MoE(config, weights, own=own, **among)
            assert torch.equal(module(x), expected), (own, shard)
            assert torch.equal(module(x[: rank % 2]), expected[: rank % 2]), (own, shard)
            if own == "parameters":
                assert torch.equal(copy.deepcopy(module)(x), expected), shard
            state = {name: as_tensor(getattr(after, name)) for name, _ in module.named_parameters()}
            module.load_state_dict(state)
            assert torch.equal(module(x), expected_after), (own, shard)
            if own == "parameters" or shard or size == 1:
                assert all(torch.equal(state[name], tensor) for name, tensor in module.state_dict().items())
            else:
                assert "each of which keeps its own experts only" in error_of(module.state_dict)

    if size > 1:
        strange = Weights.random(config).shard((rank + 1) % size, size)
        assert f"rank_idx={rank} of {size} starts at expert" in error_of(lambda: MoE(config, strange, **among))
    if size == 4:
        wanted = "num_experts must be a multiple of num_ranks=4, got 6"
        assert wanted in error_of(lambda: replace_moe_blocks(make_model("mixtral"), **among))


def error_of(call):
    try:
        call()
    except Exception as error:
        return str(error)
    raise AssertionError("no error")


def models(rank, size, among):
    """Each with its own prompts: logits are bit for bit those of the model on one rank, the greedy text is eager's."""
    register("alone")
    register("flashmoe", **among)
    ids = make_ids(1 + rank % 2, 5 + 3 * rank, seed=rank)
    for family, changes in CHANGES.items():
        eager = make_model(family, **changes)
        alone, packed, plain = (copy.deepcopy(eager) for _ in range(3))
        replace_moe_blocks(alone)
        expected, text = alone(ids).logits, generated(eager, ids, new=3 + rank)
        assert (expected - eager(ids).logits).abs().max() > 0  # it is another way to compute it
        replace_moe_blocks(packed, own="packed", **among)
        replace_moe_blocks(plain, **among)
        for model in (packed, plain):
            assert torch.equal(model(ids).logits, expected), family
            with join(**among):
                assert torch.equal(generated(model, ids, new=3 + rank), text), family
        assert size * packed_bytes(alone=False) == 2 * packed_bytes(alone=True) > 0, family
        registered, one = (copy.deepcopy(eager) for _ in range(2))
        registered.set_experts_implementation("flashmoe")
        one.set_experts_implementation("alone")
        assert torch.equal(registered(ids).logits, one(ids).logits), family
        with join(**among):
            assert torch.equal(generated(registered, ids, new=3 + rank), text), family
        if "process_group" in among:
            assert torch.equal(generated(plain, ids, new=3 + rank, synced_gpus=True), text), family
        del alone, packed, plain, registered, one, model
    gc.collect()


def nobody_here(rank, size, among):
    """A rank without any tokens serves the others, also one that has never called the model."""
    model = make_model("qwen3_moe")
    text = generated(model, make_ids())
    replace_moe_blocks(model, **among)
    with join(**among):
        if rank == size - 1:
            assert torch.equal(generated(model, make_ids()), text)
    for name, parameter in model.named_parameters():  # since all have other routers, which those who served know
        if name.endswith("mlp.gate.weight"):
            parameter.neg_()
    model(make_ids())


def layers(rank, size, among):
    """Modules of one kind share a layer, which goes when no rank uses it any more."""
    config = tiny_config(num_ranks=size, num_experts=2 * size)
    modules = [MoE(config, Weights.random(config, seed), **among) for seed in range(3)]
    x = as_tensor(random_tokens(config)[rank])
    for module in modules:
        module(x)
    shared = [shared for shared in SESSION._shared.values() if shared.ranks is not None]
    assert len(shared) == 1
    module = module if rank == 0 else None
    del modules
    gc.collect()
    release(**among)
    assert not shared[0].layer.closed
    del module
    gc.collect()
    release(**among)
    assert shared[0].layer.closed


def expert_parallel(rank, size, among):
    """transformers spreads the experts: all ranks have the same tokens, experts' results are those of one rank."""
    register()
    register("alone")
    one, eager = (make_model("qwen3_moe", num_key_value_heads=4) for _ in range(2))  # heads are spread, too
    if rank == 0:
        one.save_pretrained(FOLDER)
    dist.barrier()
    how = DistributedConfig(tp_size=size, ep_size=size, ep_implementation="flashmoe")
    ours = AutoModelForCausalLM.from_pretrained(FOLDER, distributed_config=how).eval()
    ids, seen = make_ids(), []
    expected, text = eager(ids).logits, generated(eager, ids)
    one.set_experts_implementation("alone")
    experts, of_one, of_eager = ([layer.mlp.experts for layer in model.model.layers] for model in (ours, one, eager))
    for there, here in zip(experts, of_one, strict=True):
        there.register_forward_hook(lambda _, given, y, here=here: seen.append(torch.equal(y, here(*given))))
    logits = ours(ids).logits
    assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-6  # attention is spread, too
    made, make = [], SESSION._make
    SESSION._make = lambda *parts: made.append(parts) or make(*parts)
    assert torch.equal(generated(ours, ids), text)
    del SESSION._make
    assert len(seen) == 2 + 2 * 6 and all(seen) and not made
    assert size * packed_bytes(alone=False) == packed_bytes(alone=True) > 0
    generator = torch.Generator().manual_seed(0)
    for rows in (0, 1, 3, 7):
        x, factors = torch.randn(rows, 48, generator=generator), torch.rand(rows, 3, generator=generator)
        idx = torch.rand(rows, 10, generator=generator).argsort(1)[:, :3] - 1  # of 8 experts; -1 and 8 are no choice
        none = (idx < 0) | (idx == 8)
        y = experts[0](x, idx, factors)
        assert seen.pop()
        torch.testing.assert_close(y, of_eager[0](x, idx.where(~none, 0), factors.where(~none, 0)))
    how = DistributedConfig(tp_size=size, ep_size=size)
    theirs = dict(distributed_config=how, experts_implementation="flashmoe")
    refused = error_of(lambda: AutoModelForCausalLM.from_pretrained(FOLDER, **theirs).eval()(ids))
    assert 'spread over ranks by transformers (without ep_implementation="flashmoe")' in refused


def main(launcher, folder, *scenarios):
    global FOLDER
    FOLDER = folder
    rank, size, among = begin(launcher)
    try:
        for scenario in scenarios:
            began = time.perf_counter()
            with torch.no_grad():
                globals()[scenario](rank, size, among)
            gc.collect()
            release(**among)
            release()
            print(f"rank {rank}: {scenario} took {time.perf_counter() - began:.1f} s", flush=True)
        said = "ok"
    except BaseException:
        said = traceback.format_exc()
    Path(folder, f"rank{rank}.txt").write_text(said)
    if said != "ok":
        raise SystemExit(said)


if __name__ == "__main__":
    main(*sys.argv[1:])
