"""What is run of a variant: forwards, or backwards with theirs."""

from collections.abc import Callable
from dataclasses import dataclass

import ptx_backward_runs
import ptx_backward_worlds
import ptx_runs
import ptx_worlds


@dataclass(frozen=True)
class Pass:
    """Worlds of one kind.

    Args:
        num_worlds: that there are.
        make_world: of (variant, number).
        run_world: of (world, how).
        several_ranks: number of a world that has them.
        invariant: results by token or expert, which have the same bits on any number of ranks.
    """

    num_worlds: int
    make_world: Callable
    run_world: Callable
    several_ranks: int
    invariant: tuple[str, ...]


FORWARD = Pass(ptx_worlds.WORLDS, ptx_worlds.make_world, ptx_runs.run_world, 2, ("y",))
BACKWARD = Pass(
    ptx_backward_worlds.WORLDS, ptx_backward_worlds.make_world, ptx_backward_runs.run_world, 0,
    ("x", "topk_weights", "logits", "up_proj", "down_proj"),
)  # fmt: skip
PASSES = {"forward": FORWARD, "backward": BACKWARD}


def pass_of(variant):
    return BACKWARD if variant.backward else FORWARD
