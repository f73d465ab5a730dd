"""The sizes of a distributed Mixture-of-Experts layer: the one vocabulary that every other module uses.

A config is a frozen value without I/O. It is validated when it is made, so code that receives one need not check again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .activations import ACTIVATIONS
from .formats import DTYPES, FORMATS, NumberFormat
from .layer_kinds import ExpertKind, RouterKind, check_range
from .scalars import check_name, dtype_name, make_plain, whole

SIZES: tuple[str, ...] = ("num_ranks", "num_tokens", "hidden", "ffn", "num_experts", "num_topk")
SIZES += ("tile_m", "tile_m_min", "tile_n", "token_block")
ZEROS: tuple[str, ...] = ("identity", "none")  # what a zero-computation expert makes of a token


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Sizes and rules of one layer. NumPy's scalars are taken as numbers, and kept as Python's.

    Tokens are data parallel: every rank holds up to `num_tokens` rows of `hidden` elements. Experts are blocked:
    expert `e` lives on rank `e // num_experts_per_rank`.

    Args:
        num_ranks: ranks of expert parallelism; must divide `num_experts`.
        num_tokens: the most tokens one rank may bring to a call.
        hidden: row length of tokens and results.
        ffn: row length between the two matrix products of an expert.
        num_experts: experts over all ranks.
        num_topk: experts that each token is sent to.
        gated: two up projections, `act(gate) * up`, instead of one.
        activation: one of `ACTIVATIONS`; gelu is the exact one (erf).
        dtype: element type of tokens, expert weights and results, one of `DTYPES`, or the NumPy type of that name,
            which is kept as its name. Sums are float64 for float64, else float32. Between the two products, and as a
            result before its routing weight is applied, a row is rounded to the element type: beyond its range it
            becomes infinite (float16: from 65,520 on).
        capacity: rows that one source rank may send to one expert; None means no limit (dropless).
        renormalize: divide the chosen probabilities by their sum.
        router, expert: the kind of router and of experts, or dictionaries of their fields; None: what `renormalize`,
            `gated` and `activation` say, the short spelling of plain ones. Where a kind is given, these stay as they
            are by default, or say the same. Read `router_kind`, `expert_kind`.
        shared_ffn: width of the shared expert, which every token of every rank goes through beside its choices (of
            several: the sum of their widths); 0: there is none.
        shared_expert: its kind; None: that of the others.
        shared_gate: its result times sigmoid(x @ shared_gate_weight).
        num_zero: zero-computation experts: choices from num_experts on, which send nothing anywhere.
        zero: what such a choice adds, one of `ZEROS`: its weight times the token itself, or nothing.
        tile_m, tile_m_min: tallest and shortest row tile; heights double from the one to the other.
        tile_n: columns of the product that a tile computes; a gated one has gate and up columns.
        token_block: tokens per gate task and per combine task.

    Raises:
        TypeError, ValueError: naming the argument, its value and the rule.
    """

    num_ranks: int
    num_tokens: int
    hidden: int
    ffn: int
    num_experts: int
    num_topk: int
    gated: bool = False
    activation: str = "gelu"
    dtype: str = "float32"
    capacity: int | None = None
    renormalize: bool = True
    router: RouterKind | None = None
    expert: ExpertKind | None = None
    shared_ffn: int = 0
    shared_expert: ExpertKind | None = None
    shared_gate: bool = False
    num_zero: int = 0
    zero: str = "identity"
    tile_m: int = 128
    tile_m_min: int = 16
    tile_n: int = 128
    token_block: int = 32

    def __post_init__(self) -> None:
        make_plain(self)
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        for name, kind in (("router", RouterKind), ("expert", ExpertKind), ("shared_expert", ExpertKind)):
            object.__setattr__(self, name, _as_kind(name, getattr(self, name), kind))
        for name in SIZES:
            self._check_size(name, getattr(self, name))
        for name in ("shared_ffn", "num_zero"):
            self._check_size(name, getattr(self, name), least=0)
        for name in ("gated", "renormalize", "shared_gate"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        self._check_choice("activation", ACTIVATIONS)
        self._check_choice("dtype", DTYPES)
        self._check_choice("zero", ZEROS)
        self._check_relations()

    @staticmethod
    def _check_size(name: str, value: object, least: int = 1) -> None:
        if not least <= whole(name, value) < 2**31:
            raise ValueError(f"{name} must be in [{least}, 2**31 - 1], got {value}")

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        check_name(name, getattr(self, name), choices)

    def _check_relations(self) -> None:
        if self.num_experts % self.num_ranks:
            raise ValueError(f"num_experts must be a multiple of num_ranks={self.num_ranks}, got {self.num_experts}")
        if self.num_tokens * self.num_topk >= 2**31:  # pairs are numbered by int32
            limit = (2**31 - 1) // self.num_topk
            raise ValueError(f"num_tokens must be in [1, {limit}] for num_topk={self.num_topk}, got {self.num_tokens}")
        if self.num_topk > self.num_choices:
            most = f"num_experts={self.num_experts}" + (f" + num_zero={self.num_zero}" if self.num_zero else "")
            raise ValueError(f"num_topk must be in [1, {most}], got {self.num_topk}")
        if self.shared_gate and self.shared_ffn == 0:
            raise ValueError("shared_gate must be False without a shared expert (shared_ffn=0), got True")
        self._check_kinds()
        if self.capacity is not None:
            self._check_size("capacity", self.capacity)
            if self.capacity > self.num_tokens:
                raise ValueError(f"capacity must be in [1, num_tokens={self.num_tokens}] or None, got {self.capacity}")
        ratio = self.tile_m // self.tile_m_min
        if self.tile_m_min * ratio != self.tile_m or ratio & (ratio - 1):
            raise ValueError(f"tile_m must be tile_m_min={self.tile_m_min} times a power of two, got {self.tile_m}")

    def _check_kinds(self) -> None:
        for name in ("renormalize", "gated", "activation"):
            kind, default = self.router if name == "renormalize" else self.expert, MoEConfig.__dataclass_fields__[name]
            value = getattr(self, name)
            if kind is not None and value != default.default and value != getattr(kind, name):
                raise ValueError(f"{name} must say what {type(kind).__name__} says, {getattr(kind, name)}, got {value}")
        self.router_kind.check_sizes(self.num_choices, self.num_topk)
        for any_kind in (self.router_kind, self.expert_kind, self.shared_kind):
            check_range(any_kind, self.format.sums)
        if self.num_zero and self.router_kind.num_always:
            raise ValueError(f"num_zero must be 0 for a router with num_always, got {self.num_zero}")
        if self.shared_expert is not None and self.shared_expert.gated != self.expert_kind.gated:
            raise ValueError(f"shared_expert must be gated as the others, {self.expert_kind.gated}, or not as they")
        if self.shared_ffn and self.shared_kind.norm_eps is not None:
            raise ValueError("shared_expert must have norm_eps=None")

    @property
    def num_experts_per_rank(self) -> int:
        return self.num_experts // self.num_ranks

    @property
    def num_choices(self) -> int:
        """What a router has a logit for: experts, then zero-computation experts."""
        return self.num_experts + self.num_zero

    @property
    def slots(self) -> int:
        """Rows that a packet (one source, one expert) can hold."""
        return self.num_tokens if self.capacity is None else self.capacity

    @property
    def tile_ffn(self) -> int:
        """Columns of the hidden rows in one tile: each takes two columns of a gated product."""
        return max(1, self.tile_n // self.expert_kind.num_ups)

    @property
    def router_kind(self) -> RouterKind:
        return self.router or RouterKind(score="softmax", renormalize=self.renormalize)

    @property
    def expert_kind(self) -> ExpertKind:
        return self.expert or ExpertKind(activation=self.activation, gated=self.gated)

    @property
    def shared_kind(self) -> ExpertKind:
        """Of the shared expert."""
        return self.shared_expert or self.expert_kind

    @property
    def format(self) -> NumberFormat:
        """Format of tokens, hidden rows and results."""
        return FORMATS[self.dtype]

    @property
    def weight_format(self) -> NumberFormat:
        """Format of expert weights: that of tokens."""
        return self.format

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Element type of tokens, hidden rows and results."""
        return self.format.dtype

    @property
    def accumulator(self) -> np.dtype[Any]:
        """Type of sums, logits and routing weights."""
        return self.format.sums.dtype

    def owner(self, expert: int) -> int:
        """Rank on which a global expert index lives."""
        return expert // self.num_experts_per_rank


def expert_capacity(config: MoEConfig, factor: float) -> int:
    """Rows from one rank to one expert at a capacity factor: `ceil(num_tokens / num_experts) * num_topk` times that.

    At most all tokens of the rank. Source: FlashMoE (arXiv 2506.04667), whose layer has it at factor 1.

    Raises:
        ValueError: the factor is not positive and finite, or leaves less than one row.
    """
    if not 0 < factor < float("inf"):
        raise ValueError(f"capacity_factor must be positive and finite, got {factor}")
    even = -(-config.num_tokens // config.num_experts) * config.num_topk
    rows = int(min(config.num_tokens, factor * even))
    if rows < 1:
        raise ValueError(f"capacity_factor must leave a row: {factor:g} times {even} rows is {rows}")
    return rows


def _as_kind(name: str, value: Any, kind: type[RouterKind] | type[ExpertKind]) -> Any:
    """A kind, from the dictionary that `dataclasses.asdict` makes of it as well."""
    if isinstance(value, Mapping):
        return kind(**value)
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, a dictionary of its fields or None, got {value!r}")
    return value
