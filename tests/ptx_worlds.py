"""Small worlds for kernels that run as linked PTX, by number: a layer, its calls, its blocks and the machine's seed.

A number gives the same world in every process. Some of its sizes go through all their values by the number, the others
are drawn; a table says which worlds have something that is not small.
"""

import zlib
from dataclasses import dataclass, replace

import numpy as np
from ptx_endings import ENDINGS, RESULTS_LOST

from flashmoe_numba.build.variants import choose_variant
from reference import ACTIVATIONS, MoEConfig, Weights
from reference.formats import FORMATS

WORLDS = 48


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call.

    Args:
        counts: tokens of each rank.
        seed: of tokens and routing.
        bias: None for the kernel's routing; else one from outside, even (0) or to few experts (50).
        padded: some choices are left out.
        scale: of the tokens.
        spoiled: one token is not finite.
        captured: into a graph, which is launched twice.
    """

    counts: tuple[int, ...]
    seed: int
    bias: float | None = None
    padded: bool = False
    scale: float = 1.0
    spoiled: bool = False
    captured: bool = False


@dataclass(frozen=True, kw_only=True)
class World:
    """A layer on the machine.

    Args:
        number, seed: which one it is; of the machine's schedule.
        own_gpus: each rank's blocks are a GPU of their own.
        packing: of the layer.
        offset: tokens do not begin at a multiple of 16 bytes.
        huge: tiles and token blocks are larger than 32 bits can say, so that there is one of each.
        endings: how calls of further layers end, keys of ENDINGS.
    """

    variant: object
    number: int
    config: MoEConfig
    bias: bool
    num_processors: int
    calls: tuple[Call, ...]
    seed: int
    own_gpus: bool
    trace: bool
    packing: str
    offset: bool
    huge: bool
    endings: tuple[str, ...]

    @property
    def weights(self):
        return Weights.random(self.config, seed=self.number, bias=self.bias)

    @property
    def tf32(self):
        return self.variant.name.endswith("tf32")

    def with_one_call(self, counts):
        return replace(self, calls=(Call(counts=counts, seed=3),))

    def __str__(self):
        return f"{self.variant.name} world {self.number} (seed {self.seed})"


# Worlds with something that is not small, and which of their kind they are. Loops that the compiler unrolled by four
# have ways out after one, two and three turns; a thread takes several turns only where there are that many things.
TALL, MANY_EXPERTS, MANY_TOKENS, WIDE = "tall", "many experts", "many tokens", "wide"
LARGE = {
    number: (kind, place)
    for kind, numbers in {
        TALL: (4, 10, 16, 22, 34, 40, 41, 42, 44, 45, 46, 47), MANY_EXPERTS: (6, 19, 32), MANY_TOKENS: (7, 20, 31),
        WIDE: (11, 24, 37),
    }.items()
    for place, number in enumerate(numbers)
}  # fmt: skip
HUGE_WORLD = 39
MORE = (0, 5, 17, 25, 29, 35)  # with a shared expert, most of them with zero-computation experts
UNITS = (1, 5, 9, 17, 33, 57)  # of 16 bytes: part of a block of the depth, several, more than all stages hold


def make_world(variant, number):
    """World `number` of a variant."""
    rng = np.random.default_rng([number, zlib.crc32(variant.name.encode())])
    kind, place = LARGE.get(number % WORLDS, (None, 0))
    ends = number % 5 == 3
    sizes = _sizes(variant, rng, number)
    sizes |= _tensor_sizes(variant, rng) if variant.tensor_cores else _lanes_sizes(rng)
    if kind:
        sizes |= _large_sizes(variant, kind, place)
    huge = number % WORLDS == HUGE_WORLD
    if huge:
        unit = _unit(variant)  # all columns are one tile of the matrices, too
        sizes |= dict(num_ranks=1, num_experts=1, num_topk=1, capacity=None, hidden=5 * unit, ffn=unit, tile_n=128)
    if ends:
        sizes |= _sizes_of_endings(variant, sizes, number)
    config = MoEConfig(**sizes)
    if not variant.tensor_cores and choose_variant(config, variant.architecture).tensor_cores:
        config = replace(config, ffn=config.ffn + 1)  # rows of no whole 16 bytes, which tensor cores cannot take
    if number in MORE:
        config = replace(config, **_more(variant, MORE.index(number)))
    return World(
        variant=variant, number=number, config=config, bias=number % 3 > 0,
        num_processors=int(rng.choice([1, 1, 1, 2, 3])) if config.num_ranks < 4 else 1,
        calls=tuple(_call(config, rng, number, kind or ends, i) for i in range(1 if kind or ends else 2)),
        seed=number, own_gpus=number % 4 > 0, trace=number % 4 == 2,
        packing="none" if number % 9 == 7 else "sources",
        offset=place == 1 if kind == WIDE else number % 4 == 1,
        huge=huge,
        endings=tuple(ENDINGS) if ends else (RESULTS_LOST,) if kind == MANY_EXPERTS else (),
    )  # fmt: skip


def _more(variant, place):
    """A shared expert of one column tile and of several, and zero-computation experts."""
    width = _unit(variant) * (1, 9, 17)[place % 3] if variant.tensor_cores else (5, 70, 24)[place % 3]
    zero = "identity" if place % 3 else "none"
    return dict(shared_ffn=width, shared_gate=place % 2 == 0, num_zero=(2, 0, 1)[place % 3], zero=zero)


def _sizes(variant, rng, number):
    """What worlds of all variants have."""
    num_ranks = (2, 3, 2, 1, 2, 4, 1)[number % 7]
    num_experts = num_ranks * int(rng.integers(1, max(2, 8 // num_ranks) + 1))
    num_tokens = int(rng.integers(1, 12))
    return dict(
        num_ranks=num_ranks,
        num_tokens=num_tokens,
        num_experts=num_experts,
        num_topk=int(rng.choice(sorted({1, min(2, num_experts), min(3, num_experts), num_experts}))),
        gated=number % 2 == 1,
        activation=ACTIVATIONS[number // 2 % len(ACTIVATIONS)],
        dtype=variant.dtype,
        capacity=None if number % 3 else int(rng.integers(1, num_tokens + 1)),
        renormalize=bool(rng.integers(2)),
        token_block=int(rng.choice([1, 2, 3, 5, 32])),
    )


def _lanes_sizes(rng):
    """Any sizes, of which several are no multiple of a tile or of a pass."""
    tile_m_min = int(rng.choice([1, 2, 3, 16]))
    hidden, ffn = int(rng.choice([1, 5, 8, 13, 33, 40, 72])), int(rng.choice([1, 4, 7, 24, 40, 70]))
    tile_n = int(rng.choice([64, 100, 128] if max(hidden, ffn) > 30 else [2, 3, 9, 64]))
    tile_m = tile_m_min * int(rng.choice([1, 2, 4, 8]))
    return dict(hidden=hidden, ffn=ffn, tile_n=tile_n, tile_m=tile_m, tile_m_min=tile_m_min)


def _tensor_sizes(variant, rng):
    """Rows of whole 16 bytes, and the tile of tensor cores."""
    hidden, ffn = (_unit(variant) * int(rng.choice(UNITS, p=[0.1, 0.25, 0.2, 0.2, 0.15, 0.1])) for _ in range(2))
    tile_m_min = int(rng.choice([8, 16, 16]))
    return dict(
        hidden=hidden, ffn=ffn, tile_n=128, tile_m=tile_m_min * int(rng.choice([1, 4, 8])), tile_m_min=tile_m_min
    )


def _by_eight(variant):
    """Its compiler unrolls loops by eight, the others' by at most four."""
    return variant.architecture == "sm_100a"


def _unit(variant):
    """Elements in 16 bytes."""
    return 16 // FORMATS[variant.dtype].num_bytes


def _large_sizes(variant, kind, place):
    """`tall`: packets for tiles of every height. The others: more of what threads share out than there are threads."""
    unit, tensor = _unit(variant), variant.tensor_cores
    common = dict(capacity=None, tile_n=128, num_ranks=1 + place % 2)
    if kind == TALL:
        depths = dict(hidden=57 * unit, ffn=58 * unit)  # more than all stages hold, whatever the height
        if place in (5, 7):  # the last stage to be read lies where the sums will
            depths = dict(hidden=41 * unit, ffn=42 * unit)
        if not tensor:
            depths = dict(
                hidden=(70, 120, 74, 57, 125, 41, 57, 40, 40, 33, 35, 41)[place],
                ffn=(120, 57, 90, 40, 70, 33, 58, 41, 25, 30, 20, 9)[place],
            )
        common |= dict(num_ranks=1, num_experts=1, num_topk=1, token_block=50, tile_m=128, tile_m_min=16)
        if place == 7:  # a tile in three passes, of 128 rows twice and of 50
            common |= dict(tile_m=512)
        if (
            place >= 8
        ):  # tiles with rows of several ranks, of each height: the second one comes while a tile is multiplied
            ranks = 4 if place == 8 else 2
            common |= dict(num_ranks=ranks, num_experts=ranks, num_topk=ranks, tile_m=16 << (place + 2) % 4)
        # heights whose last rows are used: 31 of 32, 16 of 16
        num_tokens = (24, 50, 100, 140, 60, 31, 16, 306, 35, 140, 20, 40)[place]
        return common | depths | dict(num_tokens=num_tokens, gated=place % 2 == 1)
    if kind == WIDE:
        hidden = (513, 300, 360)[place] * unit
        hidden -= place == 1 and not tensor  # rows that are copied by elements; for tensor cores by their offset
        return common | dict(hidden=hidden, ffn=unit, num_experts=2, num_topk=1, num_tokens=3)
    common |= dict(hidden=unit, ffn=unit, tile_m=16, tile_m_min=16)
    if kind == MANY_EXPERTS:
        most = 1100 if _by_eight(variant) else 540
        return common | dict(num_experts=(most, 300, 360)[place], num_topk=5, num_tokens=30, token_block=32)
    num_tokens, token_block = ((280, 256), (1100 if _by_eight(variant) else 540, 1), (170, 256))[place]
    return common | dict(num_ranks=1, num_tokens=num_tokens, num_experts=2, num_topk=2, token_block=token_block)


def _sizes_of_endings(variant, sizes, number):
    """Two to five ranks, and in half of the worlds several row tiles; rows are short, because many calls are made."""
    num_ranks, unit = (2, 3, 9 if _by_eight(variant) else 4, 5)[number // 5 % 4], _unit(variant)
    experts = num_ranks * -(-sizes["num_experts"] // num_ranks)
    short = dict(num_ranks=num_ranks, num_experts=experts, capacity=None, hidden=5 * unit, ffn=unit, tile_n=128)
    if number % 2:
        short |= dict(num_tokens=20, tile_m=16, tile_m_min=8, num_experts=num_ranks, num_topk=1)
    return short


def _call(config, rng, number, full, i):
    most = config.num_tokens
    counts = [
        most if full else int(rng.choice([0, 1, most, most, rng.integers(most + 1)])) for _ in range(config.num_ranks)
    ]
    outside = not full and (number + i) % 3 == 1
    return Call(
        counts=tuple(counts),
        seed=int(rng.integers(1 << 30)),
        bias=float(rng.choice([0.0, 2.0, 50.0])) if outside else None,
        padded=outside and number % 2 == 0,
        scale=float(rng.choice([1.0, 1.0, 8.0, 0.01])),
        spoiled=number % 8 == 5 and not outside,
        captured=number % 5 == 2 and i == 1,
    )
