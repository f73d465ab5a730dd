"""Calls that cannot end well: what is done to a rank's arrays before them, and what must be told.

Ranks of one launch always come, so the damage is made by hand: a counter or a word that lies, as a fault elsewhere
would leave it. No call may hang, none may end as if all were well, and each must name what was waited for.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from flashmoe_numba.errors import FlashMoEError
from flashmoe_numba.kernel.control import ABORT, SILENT
from flashmoe_numba.kernel.queue import COUNTER_STRIDE, GATES_DONE, GEMM_TASKS, HEAD, NUM_COUNTERS
from reference.layout import Layout, tile_height


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a call goes wrong.

    Args:
        damage: what is done to the ranks before it, given the call's epoch.
        says: pattern of what is told.
        ranks: fewest of the layer.
        deadline_s: of the machine's time.
        certain: False: it may end well.
    """

    damage: Callable
    says: str
    ranks: int = 1
    deadline_s: float = 1e-4
    certain: bool = True


def _add(rank, epoch, name, value):
    """Make one of a rank's counters begin at another value."""
    rank.queue.counters[((epoch & 1) * NUM_COUNTERS + name) * COUNTER_STRIDE] = value


def _stop_all(ranks, epoch):
    for rank in ranks:
        rank.control[ABORT] = 1


def _stop_last(ranks, epoch):
    ranks[-1].control[ABORT] = len(ranks)


def _stop_last_of_waiting(ranks, epoch):
    _stop_last(ranks, epoch)
    for rank in ranks:
        rank.control[SILENT] = epoch


def _stop_first(ranks, epoch):
    ranks[0].control[ABORT] = 2


def _keep_gate_shut(ranks, epoch):
    _add(ranks[0], epoch, GATES_DONE, 1000)


def _keep_gates_shut(ranks, epoch):
    for rank in ranks:
        _add(rank, epoch, GATES_DONE, 1000)


def _promise_tasks(ranks, epoch):
    for rank in ranks:
        _add(rank, epoch, GEMM_TASKS, 1000)


def _lose_results(ranks, epoch):
    """The last column tile of a row tile is never known as such; the last rank's first row tiles are left alone."""
    row_blocks = Layout(ranks[0].config).row_blocks
    for rank in ranks:
        lost = rank.received.down_done.reshape(-1, row_blocks)[:, int(rank is ranks[-1] and len(ranks) > 1) :]
        lost[...] = -1000


def _draw_beyond_the_queue(ranks, epoch):
    """All tickets are for places that the queue has not."""
    for rank in ranks:
        _add(rank, epoch, HEAD, 1 << 20)


def _nothing(ranks, epoch):
    pass


HASTY_S = 8e-6  # all lanes of all blocks give up at about the same time
RESULTS_LOST = "results are lost"
ENDINGS = {
    "all were stopped": Ending(damage=_stop_all, says="rank 0 gave up"),
    "the last rank was stopped": Ending(damage=_stop_last, ranks=2, says="."),
    "a gate stays shut": Ending(damage=_keep_gate_shut, says="gave up in epoch .*: waited for (the gate|.* flag)"),
    "all gates stay shut": Ending(damage=_keep_gates_shut, says="gave up in epoch .*: waited for", deadline_s=HASTY_S),
    "tasks that never come": Ending(damage=_promise_tasks, says=r"gave up in epoch .*: waited for task \d+"),
    RESULTS_LOST: Ending(damage=_lose_results, says="gave up in epoch .*: waited for the result flag of rank"),
    "the first rank was stopped": Ending(damage=_stop_first, ranks=2, says=".", deadline_s=HASTY_S),
    "the last rank was stopped, and all wait": Ending(damage=_stop_last_of_waiting, ranks=2, says="."),
    "packets that do not come in time": Ending(damage=_stop_last, ranks=2, says=".", deadline_s=HASTY_S),
    "results that do not come in time": Ending(damage=_lose_results, says=".", deadline_s=HASTY_S),
    "tasks that do not come in time": Ending(damage=_promise_tasks, says=".", deadline_s=HASTY_S),
    "tickets beyond the queue": Ending(damage=_draw_beyond_the_queue, says="gave up in epoch .*: waited for "),
    "a deadline that is too short": Ending(damage=_nothing, says=".", deadline_s=HASTY_S, certain=False),
}


def expect_given_up(ending, layer, tokens):
    """Make a call that ends so, or may if that is not certain; it fails if it does not."""
    epoch, how = layer._backend.epoch(0, 0) + 1, ENDINGS[ending]
    how.damage(layer._ranks, epoch)
    said = _told(layer, tokens)
    assert said or not how.certain, f"a call must be given up, and say {how.says!r}"
    assert not said or re.search(how.says, said), f"{said} must say {how.says!r}"
    if ending == RESULTS_LOST:
        _check_is_missing(layer, epoch, said)


def _told(layer, tokens):
    """What the error of a call says; "" if there is none."""
    try:
        layer(tokens)
        layer.synchronize()
    except FlashMoEError as error:
        return str(error)
    return ""


NAMED = r"rank (\d+), block .* waited for the result flag of rank (\d+), its expert (\d+), row tile (\d+)"


def _check_is_missing(layer, epoch, said):
    """Whom a call names for a lost result is a row tile that there is, and that has not been seen."""
    waiting, owner, expert, m = map(int, re.search(NAMED, said).groups())
    config, rank = layer.config, layer._ranks[waiting]
    e = owner * config.num_experts_per_rank + expert
    sent = int(layer._backend.to_host(rank.tokens.sent)[e])
    seen = layer._backend.to_host(rank.tokens.result_seen).reshape(config.num_experts, -1)[e]
    height = tile_height(sent, config.tile_m_min, config.tile_m)
    assert expert < config.num_experts_per_rank, said
    assert m * height < sent, f"{said}: of {sent} rows in tiles of {height}"
    assert seen[m] != epoch, f"{said}: it was seen"
