"""Small worlds of ranks on several hosts, between which a network carries puts (run/network.py); worlds.py has them.

Together they have: two hosts and three, of as many ranks or not; row tiles of several sources, on this host and on
others; results of several chunks; drops; ranks without tokens, of whose empty packets two calls tell at a time; a
shared expert; three lanes; backwards of every kind of saving; a rank that is a call ahead; hosts that leave; ranks that
are lost, with deadlines running, also alone on their hosts; and ranks that make different calls.
"""

from __future__ import annotations

from typing import Any

from reference import MoEConfig

from .backward_worlds import BASE, WIDE, world
from .run.program import Astray
from .run.spec import GivenCall, Lost, WorldSpec

FOUR: dict[str, Any] = dict(
    num_ranks=4, num_tokens=3, hidden=5, ffn=3, num_experts=4, num_topk=2, gated=True, activation="silu",
    tile_m=4, tile_m_min=2, tile_n=4, token_block=2,
)  # fmt: skip
THREE: dict[str, Any] = FOUR | dict(num_ranks=3, num_experts=3)
TALL: dict[str, Any] = THREE | dict(num_topk=1, num_tokens=7, capacity=5, tile_m=8)
FULL: dict[str, Any] = THREE | dict(num_experts=6, num_topk=3, capacity=1, token_block=1, renormalize=False)
IDLE = GivenCall((0, 2, 0, 3)), GivenCall((2, 0, 0, 0)), GivenCall((3, 0, 1, 0))
PAIR: dict[str, Any] = FOUR | dict(num_ranks=2, num_experts=2)
ALONE: dict[str, Any] = THREE | dict(num_tokens=2, num_topk=1)

HOST_WORLDS: dict[str, WorldSpec] = {
    "two hosts": WorldSpec(config=MoEConfig(**FOUR), num_processors=1, epochs=3, hosts=2),
    "three hosts": WorldSpec(config=MoEConfig(**THREE | dict(shared_ffn=3)), lanes=2, epochs=2, hosts=3),
    "tiles across hosts": WorldSpec(config=MoEConfig(**TALL), epochs=2, hosts=2),
    "chunks across hosts": WorldSpec(
        config=MoEConfig(**PAIR | dict(num_tokens=9, tile_m=2, tile_m_min=1)), lanes=3, epochs=2, hosts=2
    ),
    "drops across hosts": WorldSpec(config=MoEConfig(**FULL), num_processors=1, epochs=3, data_seed=2, hosts=2),
    "idle across hosts": WorldSpec(config=MoEConfig(**FOUR), num_processors=1, epochs=3, hosts=2, given=IDLE),
    "ahead across hosts": WorldSpec(
        config=MoEConfig(**PAIR | dict(num_topk=1)), num_processors=1, epochs=5, data_seed=2, hosts=2
    ),
    "back across hosts": world(WIDE | dict(num_ranks=4, num_experts=4), (0, 1), hosts=2),
    "again across hosts": world(WIDE | dict(num_ranks=3, num_experts=3), (0, 1), "nothing", lanes=2, hosts=2),
    "two handles across hosts": world(BASE | dict(num_experts=4, num_topk=2), (0, 0, 2, 1), "rows", hosts=2),
    "leaving two hosts": WorldSpec(config=MoEConfig(**FOUR), num_processors=1, leavers=(0, 1, 2, 3), hosts=2),
    "one leaves two hosts": WorldSpec(config=MoEConfig(**FOUR), num_processors=1, leavers=(1,), hosts=2),
    "never comes across hosts": WorldSpec(
        config=MoEConfig(**ALONE), num_processors=1, epochs=2, lost=(Lost(1, 2),), deadline=2000, hosts=2
    ),
    "a host is lost": WorldSpec(
        config=MoEConfig(**ALONE), num_processors=1, epochs=2, lost=(Lost(2, 1, 2),), deadline=2000, hosts=2
    ),
    "lost between two hosts": WorldSpec(
        config=MoEConfig(**ALONE | dict(num_tokens=1)),
        num_processors=1,
        epochs=2,
        data_seed=6,
        lost=(Lost(2, 1, 2),),
        deadline=2000,
        hosts=3,
    ),
    "other calls across hosts": world(
        BASE | dict(num_ranks=3, num_experts=3), (0, 0, 2), hosts=3, astray=(Astray(0, 1),)
    ),
}
