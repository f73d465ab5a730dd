"""Every barrier of a backward's tasks, left out, is found by the explorer, in worlds of several blocks and lanes."""

import ast
from dataclasses import replace

import pytest

from flashmoe_numba.explore.backward_worlds import BACKWARD_WORLDS
from flashmoe_numba.explore.plants import KERNEL, Plant, planted
from flashmoe_numba.explore.run.watched import watch
from flashmoe_numba.explore.search import Explorer, Search

WORLDS = "gate of the shared", "frozen experts", "scaled router", "back through a norm", "rows sent again"
SPECS = [replace(BACKWARD_WORLDS[name], num_processors=2, lanes=2) for name in WORLDS]
SEEDS = 12
UNSEEN = {
    "combine.combine 4": "what ROUTER_WEIGHTS reads is behind the barriers before",
    "gemms.make_ups 1": "here the lane that makes a row's products is the one that reads them; on GPUs it is not",
    "shared.shared0 1": "likewise",
}


def find_barriers():
    """{"file.function number": (file, index of the line)} of all in kernel/backward."""
    found = {}
    for file in sorted((KERNEL / "backward").glob("*.py")):
        for function in ast.parse(file.read_text()).body:
            calls = [node for node in ast.walk(function) if isinstance(node, ast.Expr)]
            lines = sorted(node.lineno - 1 for node in calls if ast.unparse(node) == "block_sync()")
            for number, line in enumerate(lines, start=1):
                found[f"{file.stem}.{function.name} {number}"] = file, line
    return found


BARRIERS = find_barriers()


def without(barrier):
    file, line = BARRIERS[barrier]
    lines = file.read_text().splitlines(keepends=True)
    changed = [*lines[:line], lines[line].replace("block_sync()", "pass"), *lines[line + 1 :]]
    return Plant(barrier, "", str(file.relative_to(KERNEL)), "".join(lines), "".join(changed), ("race",))


def first_bad(kernel):
    """The first report of the searches, seed by seed; None: all are clean."""
    searches = [Search(spec=spec, strategy=strategy) for strategy in ("random", "pct") for spec in SPECS]
    explorers = [Explorer(search, kernel) for search in searches]
    runs = (explorer.run(seed) for seed in range(SEEDS) for explorer in explorers)
    return next((run.reports[0] for run in runs if run.reports), None)


def test_with_all_barriers_there_is_nothing_to_find():
    none = Plant("none", "", "backward/shared.py", "import annotations", "import annotations  # no change", ())
    with planted(none) as kernel:
        assert first_bad(watch(kernel)) is None


def test_those_that_are_not_seen_are_there():
    assert UNSEEN.keys() <= BARRIERS.keys() and len(BARRIERS) > 2 * len(UNSEEN)


@pytest.mark.parametrize("barrier", sorted(BARRIERS.keys() - UNSEEN.keys()))
def test_a_barrier_that_is_left_out_is_found(barrier):
    with planted(without(barrier)) as kernel:
        assert first_bad(watch(kernel)) is not None
