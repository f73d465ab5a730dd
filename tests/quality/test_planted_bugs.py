"""Bugs planted in a copy of the kernel, which the interpreted layer and its checks must find.

Here a find is an assertion of the checks, a deadlock report, or a wild index or row. Bugs that change no result under
sequential consistency, such as a signal without its release, are left to the explorer.
"""

import random
import sys

import numpy as np
import pytest
from cases import random_routing, random_tokens, tiny_config, with_no_choices
from worlds import LayerCalls, run_world

from flashmoe_numba import FlashMoE
from flashmoe_numba.device.compilation import interpreted
from flashmoe_numba.device.fibers import Deadlock
from flashmoe_numba.explore.backward_worlds import BACKWARD_WORLDS
from flashmoe_numba.explore.host_worlds import HOST_WORLDS
from flashmoe_numba.explore.plants import KERNEL, PLANTS, Plant, planted
from flashmoe_numba.explore.run.reports import KINDS
from flashmoe_numba.layer.failures import explain
from reference import Weights

NUM_WORLDS, NUM_WORLDS_OF_A_BUG = 30, 600
NO_CHANGE = Plant("no-change", "", "dispatch.py", "import annotations", "import annotations  # no change", ())
OVERTAKEN = ("one-flag-for-all-calls",)  # all ranks of a world are in the same epoch
ABORTED = ("abort-ignored",)  # no rank of a world gives up
BLAMED = [name for name, plant in PLANTS.items() if "blame" in plant.found_by]  # nor two of them
ELSEWHERE = (
    "no-barrier-before-next-epoch", "tie-to-the-last", "rows-of-a-whole-tile",  # no grid, tie, flag's rows
    "empty-packet-in-the-stream", "packing-always",  # results are right, but not which tiles there are
)  # fmt: skip
SELDOM = ("no-barrier-before-gates-done", "packets-seen-before-queued")  # lanes far apart: left to the explorer
UNSEEN = [name for name, plant in PLANTS.items() if plant.found_by == ("race",) or plant.weak]
BACKWARDS = [name for name, plant in PLANTS.items() if plant.world in BACKWARD_WORLDS]  # no world here has them
PUTS = [name for name, plant in PLANTS.items() if plant.world in HOST_WORLDS]  # nor these
NOT_HERE = {*BACKWARDS, *PUTS, *UNSEEN, *OVERTAKEN, *ABORTED, *BLAMED, *ELSEWHERE, *SELDOM}
MORE = (
    dict(shared_ffn=7, shared_gate=True, num_zero=2, tile_m=2),
    dict(shared_ffn=3, num_zero=2, zero="none"),
    dict(shared_ffn=1, shared_gate=True, num_zero=1, tile_n=2),
)
IN_WORLDS = [name for name in PLANTS if name not in NOT_HERE]


def make_world(seed):
    """A small layer in which every rule matters: drops, no choices, ragged tiles, several tiles per packet, biases.

    Every fourth one has a shared expert and zero-computation experts.
    """
    choose = random.Random(seed)
    config = tiny_config(
        num_ranks=choose.choice([1, 2, 3]),
        num_experts=6,
        num_topk=choose.choice([2, 3]),
        capacity=choose.choice([None, 1, 3, 5]),
        activation=choose.choice(["identity", "silu"]),
        gated=choose.choice([True, False]),
        renormalize=choose.choice([True, False]),
        token_block=choose.choice([1, 3]),
        **(MORE[seed // 4 % len(MORE)] if seed % 4 == 2 else {}),
    )
    counts = [[choose.choice([0, 1, 6, 7]) for _ in range(config.num_ranks)] for _ in range(3)]
    x = [random_tokens(config, count, seed) for count in counts]
    routings = [random_routing(config, count, seed, choose.choice([0.0, 50.0])) for count in counts]
    routings = [choose.choice([None, with_no_choices(config, routing, seed)]) for routing in routings]
    return LayerCalls(config, Weights.random(config, bias=True), choose.choice([1, 2]), x, routings)


def run_worlds(num_worlds):
    for seed in range(num_worlds):
        run_world(make_world(seed), backend="fibers", seed=seed, lanes=1 + seed % 3, preempt=0.3)


def overtake():
    """Rank 0 has no rows for rank 1 in epoch 1, and three in epoch 2; rank 1 looks when it has told of both."""
    config = tiny_config(num_tokens=3)
    none = random_tokens(config, [0])[0]
    with FlashMoE(config, Weights.random(config), num_processors=1, backend="fibers") as layer:
        rank = layer._ranks[1]
        from_0 = rank.segments.dispatch_flag.reshape(2, -1, 2)[0]
        from_0[:, 1], from_0[:, 0] = 1 << 32, [2 << 32 | 3, 2 << 32 | 0]
        for epoch, rows in ((1, 0), (2, 3)):
            _, record = rank.call(none, None, epoch, 1 << 62)
            layer._backend.run([record], layer._life.leave)
            assert rank.stats(epoch, 0).rows_per_expert == (rows, 0), f"epoch {epoch}"


def leave_in_a_call():
    """Rank 0 is in a call when rank 1, which has dispatched nothing, leaves."""
    config = tiny_config()
    with FlashMoE(config, Weights.random(config), num_processors=2, backend="fibers") as layer:
        _, record = layer._ranks[0].call(random_tokens(config)[0], None, 1, 1 << 62)
        layer._backend.leave(*layer._ranks[1].leaving(1))
        layer._backend.run([record], layer._life.leave)
        message = explain(0, layer._life.controls())
        assert message == "rank 0 stopped: rank 1 left in epoch 1 because of an error of its own"


def test_the_kernel_itself_passes():
    with planted(NO_CHANGE):
        run_worlds(NUM_WORLDS)
        overtake()
        leave_in_a_call()


finds = pytest.raises((AssertionError, Deadlock, IndexError, ValueError))  # ValueError: rows that there are not


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of whatever a bug computes
@pytest.mark.parametrize("name", IN_WORLDS)
def test_a_planted_bug_is_found(name):
    with planted(PLANTS[name]), finds, np.errstate(all="ignore"):
        run_worlds(NUM_WORLDS_OF_A_BUG)


@pytest.mark.parametrize("name", OVERTAKEN)
def test_a_signal_that_replaces_one_that_was_not_seen_is_found(name):
    with planted(PLANTS[name]), finds:
        overtake()


@pytest.mark.parametrize("name", ABORTED)
def test_an_ignored_abort_word_is_found(name):
    with planted(PLANTS[name]), finds:
        leave_in_a_call()


@pytest.mark.parametrize("name", PLANTS)
def test_a_plant_is_one_edit_of_the_kernel_as_it_is(name):
    plant = PLANTS[name]
    assert plant.name == name and plant.summary and plant.found_by and set(plant.found_by) <= set(KINDS)
    with planted(plant) as kernel:
        assert interpreted("flashmoe_numba.kernel") is kernel
        (folder,) = kernel.__path__
        edited = sys.modules[f"{kernel.__name__}.{plant.file[:-3].replace('/', '.')}"]
        assert edited.__file__ == f"{folder}/{plant.file}"
    assert interpreted("flashmoe_numba.kernel").__path__ == [str(KERNEL)]
    assert not any(str(folder) in str(module.__dict__.get("__file__")) for module in list(sys.modules.values()))


@pytest.mark.parametrize(("old", "times"), [("no such text", 0), ("tell_packet", 2)])
def test_an_edit_that_fits_no_place_or_two_is_refused(old, times):
    plant = Plant("planted", "", "dispatch.py", old, "", ("race",))
    with pytest.raises(ValueError, match=rf"must fit one place of dispatch.py, .* {times}x"), planted(plant):
        pass
