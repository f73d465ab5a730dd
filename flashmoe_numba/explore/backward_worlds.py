"""Small worlds of forwards and backwards (run/program.py), which worlds.py has among all others.

Together they have: every kind of saving; two calls open at once, and gradients of weights that go on in a second
backward; a rank that is a call ahead; row tiles of several sources, also of kept rows, and tiles of their own; several
column tiles of hidden rows; shared experts with a gate and without; zero-computation experts; drops; k = E; routings
from outside, without gradients of a router; a router whose logits have a bias, and its experts scales; weights that are
applied to what goes in; a norm of results; gradients of logits by way of other losses; frozen experts, and a frozen
router; grids; ranks without tokens; three lanes; a rank that is lost in a backward; and ranks that make different
calls.

All but one are of float64, whose gradients are all compared with the reference's.
"""

from __future__ import annotations

from typing import Any

from reference import ExpertKind, MoEConfig, RouterKind

from .run.program import Astray
from .run.spec import GivenCall, Lost, WorldSpec

BASE: dict[str, Any] = dict(
    num_ranks=2, num_tokens=2, hidden=3, ffn=2, num_experts=2, num_topk=1, gated=True, activation="silu",
    tile_m=2, tile_m_min=1, tile_n=2, token_block=1, dtype="float64",
)  # fmt: skip
WIDE: dict[str, Any] = BASE | dict(num_tokens=3, ffn=3, num_topk=2)  # two column tiles of hidden rows
SCALED = RouterKind(score="sigmoid", renormalize=True, norm_eps=1e-3, scale=2.5, logit_bias=True, expert_scale=True)
NORMED = ExpertKind(activation="silu", gated=True, norm_eps=1e-2)
OUTSIDE = ((0, 1), (1, -1)), ((-1, 0), (1, 0))  # experts of each rank's tokens


def world(
    sizes: dict[str, Any], program: tuple[int, ...], save: str = "rows+up", *, processors: int = 1, **fields: Any
) -> WorldSpec:
    config = MoEConfig(**sizes)
    epochs = len(program)
    return WorldSpec(config=config, num_processors=processors, epochs=epochs, save=save, program=program, **fields)


BACKWARD_WORLDS: dict[str, WorldSpec] = {
    "two handles": world(BASE | dict(num_tokens=3), (0, 0, 2, 1), lanes=2, data_seed=1),
    "rows kept": world(WIDE, (0, 1), "rows", processors=2, lanes=2),
    "rows sent again": world(WIDE, (0, 1), "nothing", processors=2),
    "gate of the shared": world(BASE | dict(shared_ffn=3, shared_gate=True, tile_n=1), (0, 1), "nothing", processors=2),
    "shared going on": world(BASE | dict(shared_ffn=2, num_tokens=3), (0, 1, 0, 3), processors=2, data_seed=2),
    "back through zero experts": world(BASE | dict(num_zero=2, num_topk=3), (0, 1), "rows", lanes=2),
    "back through drops": world(WIDE | dict(capacity=1), (0, 1), processors=2),
    "back through all": world(WIDE | dict(gated=False, dtype="float16", activation="relu2"), (0, 1), "nothing"),
    "back in own tiles": world(WIDE | dict(num_tokens=4), (0, 1), lanes=2, packing="none"),
    "weights going on": world(BASE | dict(num_experts=4, num_topk=2), (0, 1, 0, 3), "rows", data_seed=3),
    "an idle rank": world(BASE | dict(num_ranks=3, num_experts=3), (0, 1), given=(GivenCall((2, 0, 1)),) * 2),
    "routed from outside": world(
        BASE | dict(num_topk=2), (0, 1), "nothing", processors=2, given=(GivenCall((2, 2), OUTSIDE),) * 2
    ),
    "scaled router": world(BASE | dict(num_experts=4, num_topk=2, router=SCALED), (0, 1), lanes=2),
    "weights on rows": world(WIDE | dict(router=RouterKind(weight_input=True)), (0, 1), "rows", lanes=3),
    "back through a norm": world(
        WIDE | dict(num_experts=4, num_zero=1, expert=NORMED), (0, 0, 2, 1), "rows", processors=2, lanes=2
    ),
    "logits of other losses": world(
        BASE | dict(num_experts=4, num_topk=2), (0, 0, 2, 1), processors=2, logits_gradient=True, data_seed=4
    ),
    "other losses and a bias": world(
        BASE | dict(num_tokens=3, num_experts=4, router=SCALED), (0, 1, 0, 3), "nothing", logits_gradient=True
    ),
    "frozen experts": world(
        BASE | dict(shared_ffn=3, shared_gate=True), (0, 1, 0, 3), "nothing", lanes=2, frozen_experts=True
    ),
    "frozen router": world(WIDE, (0, 0, 1, 2), "rows", processors=2, frozen_router=True),
    "all frozen": world(
        BASE | dict(num_experts=4, num_topk=2),
        (0, 1, 0, 0, 4, 3),
        data_seed=6,
        logits_gradient=True,
        frozen_experts=True,
        frozen_router=True,
    ),
    "grid of both": world(BASE | dict(num_tokens=3), (0, 0, 2, 0, 4, 1), lanes=3, grid=True, data_seed=1),
    "grid of the frozen": world(
        WIDE, (0, 1, 0, 3), "nothing", lanes=2, grid=True, logits_gradient=True, frozen_router=True
    ),
    "back and ahead": world(BASE | dict(num_experts=4), (0, 0, 1, 0, 2), data_seed=5),
    "lost on the way back": world(
        BASE | dict(num_ranks=3, num_experts=3), (0, 1), lost=(Lost(1, 2, 3),), deadline=1000
    ),
    "no backward": world(BASE, (0, 1), processors=2, lanes=2, astray=(Astray(1),)),
    "another handle": world(BASE | dict(num_ranks=3, num_experts=3), (0, 0, 2), astray=(Astray(0, 1),)),
}
