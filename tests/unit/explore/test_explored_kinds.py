"""Worlds whose routers and experts are of other kinds: clean, whatever the interleaving."""

import pytest
from kinds import EXPERTS, NORMED, ROUTERS, V3
from small_worlds import spec

from flashmoe_numba.explore.search import Explorer, Search, watched_kernel
from reference import RouterKind

NUM_SEEDS = 12
GROUPS = dict(router=V3, num_experts=8, expert=EXPERTS["gpt_oss"])
INPUT = dict(router=RouterKind(score="sigmoid", weight_input=True), expert=EXPERTS["step3p7"])
ZEROS = dict(expert=NORMED, num_zero=2, num_topk=3)
ON_INPUT = dict(expert=NORMED, router=RouterKind(score="sigmoid", weight_input=True), dtype="float16")
ALWAYS = dict(router=ROUTERS["inkling"], num_experts=6, num_topk=4)


@pytest.mark.parametrize("kinds", [GROUPS, INPUT, ALWAYS, ZEROS, ON_INPUT])
def test_worlds_of_other_kinds_are_clean(kinds):
    with watched_kernel(None) as kernel:
        for lanes in (1, 3):
            explorer = Explorer(Search(spec=spec(lanes=lanes, **kinds)), kernel)
            for seed in range(NUM_SEEDS):
                run = explorer.world.run(explorer.strategy(seed), explorer.late_seed(seed))
                assert explorer.checker.check(run) == [], f"{lanes} lanes, seed {seed}"
