"""A layer gives the same bits on every schedule, for any number of processors and ranks, and wherever blocks lie."""

from dataclasses import replace

import numpy as np
from cases import assert_same_bits
from ptx_runs import run_world
from ptx_worlds import Call, make_world

SCHEDULES = ((101, 1, True), (102, 3, False), (103, 2, True))  # seed, processors, a GPU for each rank
RANKS = ((1, 1, False), (2, 2, True), (4, 1, True))  # ranks, processors, a GPU for each


def check_schedules(variant, text=None):
    """Of threads and late stores by the seed, of blocks by their number, of fences by which ranks share a GPU.

    Raises:
        AssertionError: naming world and schedule.
    """
    world = make_world(variant, 2)
    expected = run_world(world, text=text).ys
    for seed, num_processors, own_gpus in SCHEDULES:
        how = dict(seed=seed, num_processors=num_processors, own_gpus=own_gpus)
        for got, wanted in zip(run_world(world, text=text, **how).ys, expected, strict=True):
            assert_same_bits(got, wanted, f"{world}, {how}")


def check_ranks(variant, text=None):
    """Eight tokens of one, two or four ranks, by the same experts.

    Raises:
        AssertionError: naming the number of ranks.
    """
    expected, *others = (_eight_tokens(variant, text, *how) for how in RANKS)
    for got, (num_ranks, *_) in zip(others, RANKS[1:], strict=True):
        assert_same_bits(got, expected, f"{variant.name} on {num_ranks} ranks, and on one")


def _eight_tokens(variant, text, num_ranks, num_processors, own_gpus):
    small, each = make_world(variant, 0), 8 // num_ranks
    tile_n = 128 if variant.tensor_cores else 64  # by which the variant is chosen
    sizes = dict(num_experts=4, num_topk=2, capacity=None, hidden=40, ffn=24, tile_n=tile_n)
    world = replace(
        small,
        config=replace(small.config, num_ranks=num_ranks, num_tokens=each, **sizes),
        calls=(Call(counts=(each,) * num_ranks, seed=3),),
        num_processors=num_processors,
        own_gpus=own_gpus,
    )
    return np.concatenate(run_world(world, text=text).ys[0])


CHECKS = {"schedules": check_schedules, "ranks": check_ranks}
