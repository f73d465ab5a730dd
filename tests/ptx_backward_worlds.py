"""Small worlds whose calls have backwards, for kernels that run as linked PTX, by number: as those of ptx_worlds.py."""

import zlib
from dataclasses import dataclass, replace

import numpy as np
from kinds import EXPERTS, NORMED, ROUTERS

from flashmoe_numba.build.variants import choose_variant
from reference import ACTIVATIONS, ExpertKind, MoEConfig, RouterKind, Weights
from reference.formats import FORMATS
from reference.layout import SAVES

WORLDS = 32
PLAIN = RouterKind(renormalize=True)
KINDS_OF_EXPERTS = [EXPERTS["gpt_oss"], NORMED, EXPERTS["step3p7"], EXPERTS["inkling2"]]
KINDS_OF_ROUTERS = [kind for kind in ROUTERS.values() if kind.choice != "given"]  # for 12 experts
# Worlds with tiles of every height, of one source or several: (ranks, tokens of each), which all go to all experts.
TALL = {3: (1, 140), 13: (1, 24), 28: (1, 50), 8: (2, 35), 18: (3, 14), 22: (2, 12), 26: (4, 4)}
ODD = [number for number in range(1, WORLDS, 2) if number not in TALL]  # with routers of other kinds
UNITS = (1, 3, 5, 9, 17, 33)  # of 16 bytes


@dataclass(frozen=True, kw_only=True)
class BackwardWorld:
    """A layer on the machine, whose calls are kept, and have their backwards in the reverse order.

    Args:
        variant: of the backward.
        number, seed: which one it is; of the machine's schedule.
        save, packing: of the layer.
        own_gpus: each rank's blocks are a GPU of their own.
        counts: tokens of each rank, for each call.
        routed: are the calls' routings given?
        experts, router: are gradients of these weights wanted?
    """

    variant: object
    number: int
    seed: int
    config: MoEConfig
    save: str
    packing: str
    num_processors: int
    own_gpus: bool
    counts: tuple[tuple[int, ...], ...]
    routed: bool
    experts: bool
    router: bool

    @property
    def weights(self):
        return Weights.random(self.config, seed=self.number, bias=self.number % 3 > 0)

    @property
    def tf32(self):
        return self.variant.tensor_cores and self.variant.dtype == "float32"

    def with_one_call(self, counts):
        return replace(self, counts=(counts,))

    def __str__(self):
        return f"{self.variant.name} world {self.number} (seed {self.seed})"


def make_world(variant, number):
    """World `number` of a variant of backwards."""
    rng = np.random.default_rng([number, zlib.crc32(variant.name.encode())])
    config = _fitting(variant, MoEConfig(**_sizes(variant, rng, number)))
    most = config.num_tokens
    counts = [[most if number in TALL else int(rng.choice([0, 1, most, most])) for _ in range(config.num_ranks)]]
    counts += [[most - c for c in counts[0]]] if number not in TALL else []
    return BackwardWorld(
        variant=variant, number=number, seed=number, config=config,
        save=SAVES[(number + number // 3) % len(SAVES)],
        packing="none" if number % 9 == 7 else "sources",
        num_processors=1 + number % 2 if config.num_ranks < 3 else 1,
        own_gpus=number % 4 > 0,
        counts=tuple(map(tuple, counts)),
        routed=number % 5 == 2, experts=number != 10, router=number != 11,
    )  # fmt: skip


def _sizes(variant, rng, number):
    router = KINDS_OF_ROUTERS[ODD.index(number) % len(KINDS_OF_ROUTERS)] if number in ODD else PLAIN
    num_ranks = (2, 1, 3, 2, 1, 2, 4)[number % 7]
    num_experts = 12 + router.num_always
    if num_experts % num_ranks:
        num_ranks = 2
    sizes = dict(
        num_ranks=num_ranks, num_experts=num_experts, num_topk=int(rng.choice([1, 2, 3])) + router.num_always,
        num_tokens=int(rng.integers(2, 9)), dtype=variant.dtype, router=router, renormalize=router.renormalize,
        capacity=None if number % 4 else 2, token_block=int(rng.choice([1, 2, 3, 32])),
    )  # fmt: skip
    expert = KINDS_OF_EXPERTS[number // 4 % len(KINDS_OF_EXPERTS)]
    if number % 4 != 1:
        expert = ExpertKind(activation=ACTIVATIONS[number % len(ACTIVATIONS)], gated=number % 4 < 2)
    sizes |= dict(expert=expert, gated=expert.gated, activation=expert.activation)
    if number % 3 == 1:
        sizes |= dict(shared_ffn=_columns(variant, rng), shared_gate=number % 2 == 0)
    if number % 4 == 2 and not router.num_always:
        sizes |= dict(num_zero=2, zero="identity" if number % 8 == 2 else "none")
    tile_m_min = int(rng.choice([8, 16]))
    tile_n = 128 if variant.tensor_cores else int(rng.choice([9, 64, 100, 128]))
    sizes |= dict(tile_m_min=tile_m_min, tile_m=tile_m_min * int(rng.choice([1, 4])), tile_n=tile_n)
    sizes |= dict(hidden=_columns(variant, rng), ffn=_columns(variant, rng))
    if number in TALL:
        ranks, num_tokens = TALL[number]
        sizes |= dict(num_ranks=ranks, num_experts=ranks, num_topk=ranks, num_zero=0, router=PLAIN, renormalize=True)
        sizes |= dict(num_tokens=num_tokens, capacity=None, tile_m=128, tile_m_min=16, token_block=32)
    return sizes


def _columns(variant, rng):
    """Of a row: for tensor cores of whole 16 bytes, else any, of which several are no multiple of a tile or a pass."""
    unit = 16 // FORMATS[variant.dtype].num_bytes
    return unit * int(rng.choice(UNITS)) if variant.tensor_cores else int(rng.choice([1, 5, 13, 40, 70, 129]))


def _fitting(variant, config):
    """For lanes, rows of no whole 16 bytes where tensor cores could take them."""
    if not variant.tensor_cores and choose_variant(config, variant.architecture).tensor_cores:
        return replace(config, ffn=config.ffn + 1)
    return config
