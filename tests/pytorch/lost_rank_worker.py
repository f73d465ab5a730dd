"""One rank of the tests in test_lost_rank.py: `lost_rank_worker.py SCENARIO FOLDER RANK`; rank 1 is killed.

The others leave `rank0.txt` in the folder: the error that they were given. Nobody starts or ends them together, so that
none is ended because another one is.
"""

import functools
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from cases import random_tokens, tiny_config
from losing import VICTIM, lose, write

from flashmoe_numba import FlashMoE
from flashmoe_numba.heap.tensors import as_tensor
from flashmoe_numba.torch import MoE, rounds, session, sum_replicated_gradients
from reference import Weights

NUM_RANKS, DEADLINE_S = 3, 3
CONFIG = tiny_config(num_ranks=NUM_RANKS, num_experts=2 * NUM_RANKS)


def in_setup(group, folder):
    if group.rank() == VICTIM:
        os.kill(os.getpid(), signal.SIGKILL)
    FlashMoE(CONFIG, Weights.random(CONFIG), process_group=group, setup_deadline_s=DEADLINE_S)


def make_module(group):
    rounds.DEADLINE_S = DEADLINE_S
    session.FlashMoE = functools.partial(FlashMoE, deadline_s=DEADLINE_S)
    return MoE(CONFIG, Weights.random(CONFIG), process_group=group), as_tensor(random_tokens(CONFIG)[group.rank()])


def between_calls(group, folder):
    module, x = make_module(group)
    module(x)
    if group.rank() == VICTIM:
        os.kill(os.getpid(), signal.SIGKILL)
    module(x)


def in_a_call(group, folder):
    lose("after its dispatch", folder, signal.SIGKILL)
    module, x = make_module(group)
    try:
        while True:
            module(x)
    except Exception as error:
        try:
            module(x)
        except Exception as later:
            raise RuntimeError(f"{error}\nand later: {later}") from None


def in_making(group, folder):
    """Its own weights are no layer's: the others do not wait for it to make one, which takes no time."""
    module, x = make_module(group)
    if group.rank() == VICTIM:
        module.up_proj.data = module.up_proj.data[:, :-1].contiguous()
    try:
        module(x)
    finally:
        if group.rank() == VICTIM:
            os.kill(os.getpid(), signal.SIGKILL)


def in_another_order(group, folder):
    """Its modules are the others', of one shape, made in another order."""
    first, second = (1, 0) if group.rank() == VICTIM else (0, 1)
    modules = {seed: MoE(CONFIG, Weights.random(CONFIG, seed), process_group=group) for seed in (first, second)}
    try:
        modules[first](as_tensor(random_tokens(CONFIG)[group.rank()]))
    finally:
        if group.rank() == VICTIM:
            os.kill(os.getpid(), signal.SIGKILL)


def without_its_group(group, folder):
    """It has destroyed its group, and the next layer cannot be made: the others do not wait for it."""
    module, x = make_module(group)
    module(x)
    other = tiny_config(num_ranks=NUM_RANKS, num_experts=NUM_RANKS)
    module = MoE(other, Weights.random(other), process_group=group)
    try:
        if group.rank() == VICTIM:
            dist.destroy_process_group()
        module(x)
    finally:
        if group.rank() == VICTIM:
            os.kill(os.getpid(), signal.SIGKILL)


def in_adding(group, folder):
    """It has a gradient that cannot be added up: the others do not wait for it."""
    module = make_module(group)[0].requires_grad_()
    if group.rank() == VICTIM:
        module.router.grad = torch.zeros_like(module.router).to_sparse()
    try:
        sum_replicated_gradients(module, process_group=group)
    finally:
        if group.rank() == VICTIM:
            os.kill(os.getpid(), signal.SIGKILL)


def main(scenario, folder, rank):
    store = dist.FileStore(f"{folder}/store", NUM_RANKS)
    dist.init_process_group("gloo", store=store, rank=int(rank), world_size=NUM_RANKS)
    try:
        with torch.no_grad():
            globals()[scenario](dist.group.WORLD, Path(folder))
    except Exception as error:
        write(Path(folder, f"rank{rank}.txt"), f"{type(error).__name__}: {error}")
    os._exit(0)  # without taking leave of a rank that is gone


if __name__ == "__main__":
    main(*sys.argv[1:])
