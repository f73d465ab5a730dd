"""The weights of one layer: a router and a shared expert that every rank holds, and the experts of all ranks or few.

Arrays keep the layout of the frameworks, `[expert, out, in]`, so that a checkpoint's tensors are used as they are; a
kernel packs them as it likes. Leaves out: quantised weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .arrays import Array, check_array, stream
from .config import MoEConfig
from .router_extras import EXTRAS, asked_extras, check_extra, random_extras
from .scalars import whole

ROUTER_STREAM, EXPERT_STREAM, SHARED_STREAM = 0, 1, 2
EXPERT_ARRAYS = ("gate_proj", "up_proj", "down_proj", "gate_bias", "up_bias", "down_bias")  # `[n, ...]` each
SHARED_ARRAYS = tuple(f"shared_{name}" for name in EXPERT_ARRAYS)  # the same of the shared expert, without `n`


@dataclass(frozen=True, kw_only=True, eq=False)
class Weights:
    """Router and `n` consecutive experts, the first of which is expert `first_expert` of the layer.

    Args:
        router: `[num_choices, hidden]`, always of all experts, then of the zero-computation ones.
        up_proj: `[n, ffn, hidden]`.
        down_proj: `[n, hidden, ffn]`.
        gate_proj: `[n, ffn, hidden]`, for gated experts only.
        gate_bias, up_bias: `[n, ffn]`, each optional.
        down_bias: `[n, hidden]`, optional.
        router_bias: `[num_choices]`, where the kind of router has logit_bias.
        selection_bias: `[num_choices - num_always]`, where it has selection_bias.
        expert_scale: `[num_choices]`, where it has expert_scale.
        result_scale: `[hidden]`, where the kind of expert has norm_eps.
        first_expert: global index of the first expert present.
        num_zero: rows of `router` that are of zero-computation experts.
        shared_up_proj, shared_gate_proj: `[shared_ffn, hidden]`, of the shared expert if the config has one.
        shared_down_proj: `[hidden, shared_ffn]`.
        shared_gate_bias, shared_up_bias, shared_down_bias: `[shared_ffn]`, `[hidden]`, each optional.
        shared_gate_weight: `[hidden]`, if `config.shared_gate`; in the experts' dtype, or in float32.
    """

    router: Array
    up_proj: Array
    down_proj: Array
    gate_proj: Array | None = None
    gate_bias: Array | None = None
    up_bias: Array | None = None
    down_bias: Array | None = None
    router_bias: Array | None = None
    selection_bias: Array | None = None
    expert_scale: Array | None = None
    result_scale: Array | None = None
    first_expert: int = 0
    num_zero: int = 0
    shared_up_proj: Array | None = None
    shared_down_proj: Array | None = None
    shared_gate_proj: Array | None = None
    shared_gate_bias: Array | None = None
    shared_up_bias: Array | None = None
    shared_down_bias: Array | None = None
    shared_gate_weight: Array | None = None

    @classmethod
    def random(cls, config: MoEConfig, seed: int = 0, bias: bool = False, experts: range | None = None) -> Weights:
        """Normal weights of standard deviation `1 / sqrt(fan_in)`; biases, if asked for, have that of their matrix.

        What the kinds of router and expert ask for besides is there, too, and changes results. Each expert has its own
        stream, the shared one too, so `experts=range(a, b)` makes exactly that slice of the full set.
        """
        experts = _check_experts(experts, config)
        ends = ("proj", "bias") if bias else ("proj",)
        names = [f"{projection}_{end}" for end in ends for projection in config.expert_kind.projections]
        shapes = _expert_shapes(config.ffn, config)
        arrays: dict[str, Any] = {
            name: np.empty((len(experts), *shapes[name]), config.weight_format.dtype) for name in names
        }
        for position, expert in enumerate(experts):
            normal = stream(seed, EXPERT_STREAM, expert)
            for name, array in arrays.items():
                fan_in = config.ffn if name.startswith("down") else config.hidden
                array[position] = _scaled_normal(normal, shapes[name], fan_in, config)
        router = _scaled_normal(stream(seed, ROUTER_STREAM), (config.num_choices, config.hidden), config.hidden, config)
        every_rank: dict[str, Any] = _random_shared(config, seed, names) | random_extras(config, seed)
        places: dict[str, Any] = {"first_expert": experts.start, "num_zero": config.num_zero}
        return cls(router=router, **places, **arrays, **every_rank)

    @property
    def num_experts(self) -> int:
        """Experts present here, of `router.shape[0] - num_zero` in the layer."""
        return len(self.up_proj)

    @property
    def ups(self) -> list[tuple[Array, Array | None]]:
        """The up matrices with their biases, in the order of kernels: gate first, if there is one."""
        gate = [] if self.gate_proj is None else [(self.gate_proj, self.gate_bias)]
        return [*gate, (self.up_proj, self.up_bias)]

    @property
    def shared(self) -> Weights | None:
        """The shared expert as the only expert of another layer with this router, as views; None if there is none."""
        if self.shared_up_proj is None:
            return None
        arrays = {name.removeprefix("shared_"): a[None] for name, a in self._present(SHARED_ARRAYS).items()}
        return Weights(router=self.router, first_expert=0, num_zero=self.num_zero, **arrays)

    @property
    def num_bytes(self) -> int:
        every_rank = self._present(("router", "shared_gate_weight", *SHARED_ARRAYS, *EXTRAS))
        return sum(array.nbytes for array in (every_rank | self._experts()).values())

    def shard(self, rank_idx: int, num_ranks: int) -> Weights:
        """The experts that live on `rank_idx` of `num_ranks`, as views.

        Raises:
            TypeError, ValueError: no integers; num_ranks does not divide the experts, rank_idx is no rank, or its
                experts are not present.
        """
        total = len(self.router) - self.num_zero
        rank_idx, num_ranks = whole("rank_idx", rank_idx), whole("num_ranks", num_ranks)
        if num_ranks < 1 or total % num_ranks:
            raise ValueError(f"num_ranks must divide num_experts={total}, got {num_ranks}")
        if not 0 <= rank_idx < num_ranks:
            raise ValueError(f"rank_idx must be in [0, num_ranks={num_ranks}), got {rank_idx}")
        first = rank_idx * (total // num_ranks)
        start, stop = first - self.first_expert, first - self.first_expert + total // num_ranks
        if start < 0 or stop > self.num_experts:
            here = f"{self.first_expert} to {self.first_expert + self.num_experts - 1}"
            raise ValueError(f"rank_idx={rank_idx} of {num_ranks} starts at expert {first}; only {here} are present")
        arrays = {name: array[start:stop] for name, array in self._experts().items()}
        return replace(self, first_expert=first, num_zero=self.num_zero, **arrays)

    def check(self, config: MoEConfig) -> None:
        """Nothing, if these weights fit `config`.

        Raises:
            TypeError, ValueError: naming the array, what it is and what the config asks for.
        """
        shapes = _expert_shapes(config.ffn, config)
        if self.num_zero != config.num_zero:
            raise ValueError(f"num_zero must be config's, {config.num_zero}, got {self.num_zero}")
        check_array("router", self.router, (config.num_choices, config.hidden))
        _check_factor("router", self.router, config)
        self._check_optional(config)
        self._check_extras(config)
        self._check_shared(config)
        num_present = len(check_array("up_proj", self.up_proj, (None, *shapes["up_proj"])))
        for name, array in self._experts().items():
            _check_matrix(name, array, (num_present, *shapes[name]), config)
        last = config.num_experts - num_present
        if not 0 <= whole("first_expert", self.first_expert) <= last:
            raise ValueError(f"first_expert must be in [0, {last}] for {num_present} experts, got {self.first_expert}")

    def check_all(self, config: MoEConfig) -> None:
        """`check`, and that all experts are here."""
        self.check(config)
        if self.num_experts != config.num_experts:
            raise ValueError(f"weights must have all num_experts={config.num_experts}, got {self.num_experts}")

    def _check_optional(self, config: MoEConfig) -> None:
        gated = config.expert_kind.gated
        if gated and self.gate_proj is None:
            raise ValueError("gate_proj is missing, but config's experts are gated")
        for name in ("gate_proj", "gate_bias", "shared_gate_proj", "shared_gate_bias"):
            if not gated and getattr(self, name) is not None:
                raise ValueError(f"{name} is given, but config's experts are not gated")

    def _check_extras(self, config: MoEConfig) -> None:
        given = self._present(EXTRAS)
        for name, kind, shape in asked_extras(config):
            if name not in given:
                raise ValueError(f"{name} is missing, but config's kind of {kind} asks for it")
            check_extra(name, given.pop(name), shape)
        for name in given:
            raise ValueError(f"{name} is given, but config's kinds of router and experts do not ask for it")

    def _check_shared(self, config: MoEConfig) -> None:
        if config.shared_ffn == 0:
            given = list(self._present((*SHARED_ARRAYS, "shared_gate_weight")))
            if given:
                raise ValueError(f"{given[0]} is given, but config.shared_ffn is 0")
            return
        for name in [f"shared_{projection}_proj" for projection in config.expert_kind.projections]:
            if getattr(self, name) is None:
                raise ValueError(f"{name} is missing, but config.shared_ffn is {config.shared_ffn}")
        shapes = _expert_shapes(config.shared_ffn, config)
        for name, array in self._present(SHARED_ARRAYS).items():
            _check_matrix(name, array, shapes[name.removeprefix("shared_")], config)
        if config.shared_gate != (self.shared_gate_weight is not None):
            there = "missing" if config.shared_gate else "given"
            raise ValueError(f"shared_gate_weight is {there}, but config.shared_gate is {config.shared_gate}")
        if self.shared_gate_weight is not None:
            check_array("shared_gate_weight", self.shared_gate_weight, (config.hidden,))
            _check_factor("shared_gate_weight", self.shared_gate_weight, config)

    def _present(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Those of these arrays that there are, by name."""
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def _experts(self) -> dict[str, Any]:
        """Every array that has an expert index, by name."""
        return self._present(EXPERT_ARRAYS)


def _check_matrix(name: str, array: Array, shape: tuple[int, ...], config: MoEConfig) -> None:
    check_array(name, array, shape)
    if array.dtype != config.weight_format.dtype:
        raise TypeError(f"{name} must have config's dtype {config.weight_format.name}, got {array.dtype}")


def _check_factor(name: str, array: Array, config: MoEConfig) -> None:
    """Weights whose products are factors may be more exact than those of experts."""
    if array.dtype not in (config.weight_format.dtype, np.dtype(np.float32)):
        rule = " or ".join(dict.fromkeys((config.weight_format.name, "float32")))
        raise TypeError(f"{name} must have dtype {rule}, got {array.dtype}")


def _random_shared(config: MoEConfig, seed: int, names: list[str]) -> dict[str, Array]:
    """Arrays of the shared expert, by name, if there is one; `names` are those that other experts have."""
    if config.shared_ffn == 0:
        return {}
    normal, shapes = stream(seed, SHARED_STREAM), _expert_shapes(config.shared_ffn, config)
    fan_ins = {name: config.shared_ffn if name.startswith("down") else config.hidden for name in names}
    arrays = {
        f"shared_{name}": _scaled_normal(normal, shapes[name], fan_in, config).astype(config.weight_format.dtype)
        for name, fan_in in fan_ins.items()
    }
    if config.shared_gate:
        arrays["shared_gate_weight"] = _scaled_normal(normal, (config.hidden,), config.hidden, config)
    return arrays


def _expert_shapes(ffn: int, config: MoEConfig) -> dict[str, tuple[int, ...]]:
    up, down = (ffn, config.hidden), (config.hidden, ffn)
    shapes: dict[str, tuple[int, ...]] = {"gate_proj": up, "up_proj": up, "down_proj": down}
    return shapes | {"gate_bias": up[:1], "up_bias": up[:1], "down_bias": down[:1]}


def _check_experts(experts: range | None, config: MoEConfig) -> range:
    if experts is None:
        return range(config.num_experts)
    if not isinstance(experts, range):
        raise TypeError(f"experts must be a range or None, got {type(experts).__name__}")
    if experts.step != 1 or not 0 <= experts.start <= experts.stop <= config.num_experts:
        raise ValueError(f"experts must be consecutive and in [0, num_experts={config.num_experts}), got {experts}")
    return experts


def _scaled_normal(normal: np.random.Generator, shape: tuple[int, ...], fan_in: int, config: MoEConfig) -> Array:
    """Normal numbers of deviation `1 / sqrt(fan_in)` in the accumulator's type, which is the router's too."""
    sample: Array = normal.standard_normal(shape, dtype=config.accumulator.type)
    sample *= fan_in**-0.5
    return sample
