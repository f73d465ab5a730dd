"""Small worlds with names, each with something that the others have not; a search without a world goes through all.

Together they have: row tiles of several sources, also several of one expert, and of each height, and tiles of their
own for each packet; drops; shared experts with a gate and without, with row tiles shorter and taller than token
blocks, that are begun beside the gates and behind the dispatches; zero-computation experts that add the token or
nothing; token blocks of 1, 2 and 3; lanes that do not divide the experts; k = E; as many experts as ranks; one rank;
ranks without tokens; ties; all element types; hosts that leave; ranks that are lost before and in a call, with
deadlines running; and a grid. A run takes some 20 ms. Behind them come those of forwards and backwards
(backward_worlds.py), and of ranks on several hosts (host_worlds.py).
"""

from __future__ import annotations

from typing import Any

from reference import MoEConfig

from .backward_worlds import BACKWARD_WORLDS
from .host_worlds import HOST_WORLDS
from .run.spec import Lost, WorldSpec

TINY: dict[str, Any] = dict(
    num_ranks=2, num_tokens=4, hidden=5, ffn=3, num_experts=4, num_topk=2, gated=True, activation="silu",
    tile_m=4, tile_m_min=2, tile_n=4, token_block=2,
)  # fmt: skip
THREE: dict[str, Any] = TINY | dict(num_ranks=3, num_tokens=2, num_experts=3, num_topk=1)
ALL_DROP = dict(num_ranks=3, num_experts=6, num_topk=3, capacity=1, token_block=1, renormalize=False, ffn=6)
PLAIN = "plain"

ALONE: dict[str, Any] = TINY | dict(num_ranks=1, token_block=1, dtype="float64")
SEVERAL: dict[str, Any] = TINY | dict(num_experts=6, num_topk=3, capacity=3, num_tokens=5, renormalize=False)
ALL: dict[str, Any] = TINY | dict(num_topk=4, num_tokens=5, token_block=3, gated=False, dtype="float16")
PAIR: dict[str, Any] = TINY | dict(num_tokens=2, num_topk=1)
LONELY: dict[str, Any] = THREE | dict(num_tokens=1)
ONE_EACH: dict[str, Any] = TINY | dict(num_ranks=4, num_tokens=3, dtype="bfloat16")
SHARED: dict[str, Any] = TINY | dict(num_ranks=4, num_topk=4, num_tokens=3)
ZERO: dict[str, Any] = TINY | dict(num_zero=2, num_topk=6, num_tokens=3, token_block=1)
LEAN: dict[str, Any] = TINY | dict(num_experts=2, num_zero=3, num_topk=2, zero="none", shared_ffn=2, gated=False)
BLOCKS: dict[str, Any] = TINY | dict(num_tokens=5, shared_ffn=6, tile_m=2, tile_m_min=1, token_block=3)
HEIGHTS: dict[str, Any] = TINY | dict(num_ranks=3, num_experts=3, num_topk=1, num_tokens=7, capacity=5, tile_m=8)

WORLDS: dict[str, WorldSpec] = (
    {
        PLAIN: WorldSpec(config=MoEConfig(**TINY), lanes=2, epochs=3),
        "tall packets": WorldSpec(config=MoEConfig(**TINY | dict(num_tokens=9, ffn=6)), lanes=3),
        "drops": WorldSpec(config=MoEConfig(**TINY | ALL_DROP), epochs=3, data_seed=2),
        "odd lanes": WorldSpec(config=MoEConfig(**SEVERAL), lanes=2, epochs=2),
        "every expert": WorldSpec(config=MoEConfig(**ALL), epochs=2),
        "an expert a rank": WorldSpec(config=MoEConfig(**ONE_EACH), num_processors=1, epochs=2),
        "shared tiles": WorldSpec(config=MoEConfig(**SHARED), num_processors=1),
        "three heights": WorldSpec(config=MoEConfig(**HEIGHTS), epochs=2),
        "own tiles": WorldSpec(config=MoEConfig(**TINY | dict(num_tokens=7, ffn=6)), lanes=2, epochs=2, packing="none"),
        "shared expert": WorldSpec(
            config=MoEConfig(**TINY | dict(shared_ffn=5, shared_gate=True)), num_processors=3, lanes=2, epochs=2
        ),
        "shared rows across blocks": WorldSpec(config=MoEConfig(**BLOCKS), num_processors=1, epochs=3, data_seed=1),
        "zero experts": WorldSpec(config=MoEConfig(**ZERO), lanes=2, epochs=2),
        "shared and nothing": WorldSpec(config=MoEConfig(**LEAN), num_processors=3, epochs=3, data_seed=3),
        "alone": WorldSpec(config=MoEConfig(**ALONE), num_processors=3, lanes=2, ties=True),
        "far ahead": WorldSpec(
            config=MoEConfig(**TINY | dict(num_tokens=3, num_topk=1)), num_processors=1, epochs=4, data_seed=2
        ),
        "all leave": WorldSpec(config=MoEConfig(**THREE), leavers=(0, 1, 2)),
        "one leaves": WorldSpec(config=MoEConfig(**PAIR), num_processors=1, epochs=2, leavers=(1,)),
        "never comes": WorldSpec(
            config=MoEConfig(**THREE), num_processors=1, epochs=2, lost=(Lost(1, 2),), deadline=1000
        ),
        "lost on the way": WorldSpec(
            config=MoEConfig(**THREE | dict(num_experts=6)),
            num_processors=1,
            lanes=2,
            lost=(Lost(1, 1, 4),),
            deadline=1000,
        ),
        "lost between two": WorldSpec(
            config=MoEConfig(**LONELY), num_processors=1, epochs=2, data_seed=6, lost=(Lost(2, 1, 2),), deadline=1000
        ),
        "two give up": WorldSpec(config=MoEConfig(**PAIR), num_processors=1, lanes=2, lost=(Lost(1, 1),), deadline=240),
        "short of time": WorldSpec(config=MoEConfig(**TINY), lanes=2, epochs=2, deadline=100),
        "grid": WorldSpec(
            config=MoEConfig(**TINY | dict(num_tokens=3, num_experts=2, num_topk=1)), lanes=3, epochs=2, grid=True
        ),
    }
    | BACKWARD_WORLDS
    | HOST_WORLDS
)
