"""Delta debugging against brute force."""

import itertools
import random

from flashmoe_numba.explore.tell.ddmin import ddmin


def parts(items):
    return itertools.chain.from_iterable(itertools.combinations(items, n) for n in range(len(items) + 1))


def test_what_must_be_together_is_all_that_is_left():
    for seed in range(200):
        draw = random.Random(seed)
        items = list(range(draw.randint(1, 40)))
        needed = sorted(draw.sample(items, draw.randint(0, min(5, len(items)))))
        assert ddmin(items, lambda part: set(needed) <= set(part)) == needed, f"seed {seed}"  # noqa: B023


def test_no_single_item_can_be_left_out_whatever_fails():
    for seed in range(100):
        draw = random.Random(seed)
        items = list(range(draw.randint(1, 8)))
        failing = {part for part in parts(items) if draw.random() < 0.2} | {tuple(items)}
        tried = []

        def fails(part):
            tried.append(tuple(part))  # noqa: B023
            return tuple(part) in failing  # noqa: B023

        kept = tuple(ddmin(items, fails))
        assert kept in failing, f"seed {seed}"
        assert not [i for i in range(len(kept)) if kept[:i] + kept[i + 1 :] in failing], f"seed {seed}"
        assert all(set(part) <= set(items) and list(part) == sorted(part) for part in tried), f"seed {seed}"


def test_few_runs_for_few_items_of_many():
    runs = []

    def fails(part):
        runs.append(part)
        return {100, 700} <= set(part)

    assert ddmin(range(1000), fails) == [100, 700]
    assert len(runs) < 120, f"{len(runs)}"
