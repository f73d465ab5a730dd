"""A layer gives the same bits on every schedule, for any number of processors and ranks, and wherever blocks lie."""

from dataclasses import replace

import numpy as np
from cases import assert_same_bits
from ptx_passes import pass_of

SCHEDULES = ((101, 1, True), (102, 3, False), (103, 2, True))  # seed, processors, a GPU for each rank
RANKS = ((1, 1, False), (2, 2, True), (4, 1, True))  # ranks, processors, a GPU for each


def check_schedules(variant, text=None):
    """Of threads and late stores by the seed, of blocks by their number, of fences by which ranks share a GPU.

    Raises:
        AssertionError: naming world and schedule.
    """
    of = pass_of(variant)
    world = of.make_world(variant, of.several_ranks)
    expected = of.run_world(world, text=text).results
    for seed, num_processors, own_gpus in SCHEDULES:
        how = dict(seed=seed, num_processors=num_processors, own_gpus=own_gpus)
        for call, (got, wanted) in enumerate(zip(of.run_world(world, text=text, **how).results, expected, strict=True)):
            for rank, (one, other) in enumerate(zip(got, wanted, strict=True)):
                _assert_same(one, other, f"{world}, {how}, call {call}, rank {rank}")


def check_ranks(variant, text=None):
    """Eight tokens of one, two or four ranks, by the same experts.

    Raises:
        AssertionError: naming the number of ranks.
    """
    expected, *others = (_eight_tokens(variant, text, *how) for how in RANKS)
    for got, (num_ranks, *_) in zip(others, RANKS[1:], strict=True):
        _assert_same(got, expected, f"{variant.name} on {num_ranks} ranks, and on one")


def _eight_tokens(variant, text, num_ranks, num_processors, own_gpus):
    """What does not depend on ranks, of all of them."""
    of, each = pass_of(variant), 8 // num_ranks
    tile_n = 128 if variant.tensor_cores else 64  # by which the variant is chosen
    sizes = dict(num_experts=4, num_topk=2, capacity=None, hidden=40, ffn=24, tile_n=tile_n)
    small = of.make_world(variant, 0)
    config = replace(small.config, num_ranks=num_ranks, num_tokens=each, **sizes)
    world = replace(small, config=config, num_processors=num_processors, own_gpus=own_gpus)
    (of_call,) = of.run_world(world.with_one_call((each,) * num_ranks), text=text).results
    return {name: np.concatenate([of_rank[name] for of_rank in of_call]) for name in of.invariant}


def _assert_same(got, wanted, case):
    assert got.keys() == wanted.keys(), f"{case}: {sorted(got)} are not {sorted(wanted)}"
    for name, array in wanted.items():
        assert_same_bits(got[name], array, f"{case}: {name}")


CHECKS = {"schedules": check_schedules, "ranks": check_ranks}
