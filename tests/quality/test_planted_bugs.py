"""Bugs planted in a copy of the kernel, which the interpreted layer and its checks must find.

Each is one edit of the kernel's source. A find is an assertion of the checks, a deadlock report, or a wild index.
"""

import importlib.util
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from cases import random_routing, random_tokens, tiny_config
from worlds import World, run_world

import flashmoe_numba.kernel
from flashmoe_numba.backends import fibers as backend
from flashmoe_numba.device import compilation
from flashmoe_numba.device.fibers import Deadlock
from reference import Weights

KERNEL = Path(flashmoe_numba.kernel.__file__).parent
NUM_WORLDS, NUM_WORLDS_OF_A_BUG = 30, 600

BUGS = {
    "no barrier between the logits and the choices": (
        "gate.py",
        "        compute_logits(p, tokens, experts, scratch, first, rows)\n        block_sync()\n",
        "        compute_logits(p, tokens, experts, scratch, first, rows)\n",
    ),
    "a task is published before its fields": (
        "queue.py",
        "    queue.tasks[at + KIND] = kind\n",
        "    st_release(queue.tasks, at + STAMP, p.epoch)\n    queue.tasks[at + KIND] = kind\n",
    ),
    "no signal for later row tiles": (
        "processor.py",
        "        st_release(flags, e * p.row_blocks + m, signal_word(p.epoch, rows))",
        "        if m == 0:\n            st_release(flags, e * p.row_blocks + m, signal_word(p.epoch, rows))",
    ),
    "two rows in one slot": (
        "dispatch.py",
        "copy_row(target, (packet * p.slots + slot)",
        "copy_row(target, (packet * p.slots + max(slot - 1, 0))",
    ),
    "packets of one source in one place": (
        "dispatch.py",
        "packet = p.rank_idx * p.experts_per_rank + expert",
        "packet = p.rank_idx * p.experts_per_rank",
    ),
    "last finisher one early": ("processor.py", "fetch_add(done, i, 1) + 1 <", "fetch_add(done, i, 1) + 2 <"),
    "finished tiles not reset": ("processor.py", "    done[i] = 0\n", ""),
    "an old dispatch flag is taken": ("subscriber.py", ", packet)) >= p.epoch", ", packet)) > 0"),
    "an old result flag is taken": ("subscriber.py", ", i)) == p.epoch", ", i)) > 0"),
    "results added in the order k - 1 to 0": (
        "combine.py",
        "            pair = token * p.num_topk + j\n            e =",
        "            pair = token * p.num_topk + p.num_topk - 1 - j\n            e =",
    ),
    "rows beyond the capacity are sent": ("dispatch.py", "min(tokens.counts[i], p.slots - slot)", "tokens.counts[i]"),
    "a dropped pair is added": ("combine.py", "if slot < p.slots:", "if slot <= p.slots:"),
    "down projection of the first row tile": (
        "processor.py",
        "packets.hidden, packets.first_row[packet] + first, rows, experts.down",
        "packets.hidden, packets.first_row[packet], rows, experts.down",
    ),
    "hidden rows of all packets in one place": (
        "subscriber.py",
        "packets.first_row[packet] = fetch_add",
        "packets.first_row[packet] = 0 * fetch_add",
    ),
    "owner and source disagree on the tile height": (
        "processor.py",
        "height = tile_height(packets.rows[packet], p.tile_m_min, p.tile_m)",
        "height = p.tile_m_min",
    ),
    "a column tile twice": ("processor.py", "experts.up, expert, n,", "experts.up, expert, max(n - 1, 0),"),
    "the first expert's down projection": ("processor.py", "experts.down, expert, n,", "experts.down, 0, n,"),
    "weights not normalised": ("gate.py", "    if p.renormalize:\n", "    if False:\n"),
    "softmax without its sum": ("gate.py", " - highest) / total", " - highest)"),
    "a tile counted for one token block too many": ("subscriber.py", "+ e] < end:", "+ e] <= end:"),
    "a tile counted from one token block too early": (
        "subscriber.py",
        "middle * p.num_experts + e] <= slot",
        "middle * p.num_experts + e] < slot",
    ),
    "counters of the last call": ("subscriber.py", "        zero_next_counters(p, queue)\n", ""),
    "a dropped token block is never combined": (
        "gate.py",
        "if tokens.tiles_left[b] == 0:",
        "if tokens.tiles_left[b] < 0:",
    ),
    "processors leave before the combines": ("subscriber.py", " + num_token_blocks(p) + gemms", " + gemms"),
    "signal before all lanes have copied": (
        "dispatch.py",
        "    block_sync()\n    if lane() == 0:\n        flags",
        "    if lane() == 0:\n        flags",
    ),
    "down projection before all lanes have multiplied": (
        "processor.py",
        "    block_sync()\n    if lane() == 0 and finished_last(packets.up_done",
        "    if lane() == 0 and finished_last(packets.up_done",
    ),
    "signal before all lanes have multiplied": (
        "processor.py",
        "    block_sync()\n    if lane() == 0 and finished_last(packets.down_done",
        "    if lane() == 0 and finished_last(packets.down_done",
    ),
    "slots of every token block begin at 0": ("gate.py", "+ e] = slot\n", "+ e] = 0\n"),
    "rows of an earlier packet are remembered": (
        "subscriber.py",
        "    packets.rows[packet] = rows\n",
        "    if rows > 0:\n        packets.rows[packet] = rows\n",
    ),
}


def load_kernel(folder, name):
    """The package in `folder` as the interpreted kernel."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    with compilation._interpretation():
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def use_kernel(tmp_path, monkeypatch):
    """A function that makes the fibers run a copy of the kernel in which one file has been edited."""

    def use(file, old, new):
        folder, name = tmp_path / "kernel", "planted_kernel"
        shutil.copytree(KERNEL, folder, ignore=shutil.ignore_patterns("__pycache__"))
        source = (folder / file).read_text()
        assert source.count(old) == 1, (
            f"the edit should fit in one place of {file}, but {old!r} is there {source.count(old)} times"
        )
        (folder / file).write_text(source.replace(old, new))
        module = load_kernel(folder, name)
        monkeypatch.setattr(backend, "interpreted", lambda package: module)

    yield use
    for name in [name for name in sys.modules if name.split(".")[0] == "planted_kernel"]:
        del sys.modules[name]


def make_world(seed):
    """A small layer in which every rule matters: drops, ragged tiles, several tiles per packet, biases."""
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
    )
    counts = [[choose.choice([0, 1, 6, 7]) for _ in range(config.num_ranks)] for _ in range(3)]
    x = [random_tokens(config, count, seed) for count in counts]
    routings = [random_routing(config, count, seed, choose.choice([0.0, 50.0])) for count in counts]
    routings = [choose.choice([None, routing]) for routing in routings]
    return World(config, Weights.random(config, bias=True), choose.choice([1, 2]), x, routings)


def run_worlds(num_worlds):
    for seed in range(num_worlds):
        run_world(make_world(seed), backend="fibers", seed=seed, lanes=1 + seed % 3, preempt=0.3)


def test_the_kernel_itself_passes(use_kernel):
    use_kernel("dispatch.py", "import annotations", "import annotations  # no change")
    run_worlds(NUM_WORLDS)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of whatever a bug computes
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(use_kernel, bug):
    use_kernel(*BUGS[bug])
    with pytest.raises((AssertionError, Deadlock, IndexError)), np.errstate(all="ignore"):
        run_worlds(NUM_WORLDS_OF_A_BUG)
