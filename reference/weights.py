"""The weights of one layer: a router that every rank holds, and the experts of all ranks or of a few.

Arrays keep the layout of the frameworks, `[expert, out, in]`, so that a checkpoint's tensors are used as they are; a
kernel packs them as it likes. Leaves out: quantised weights, experts shared by all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .arrays import Array, check_array, check_floating, stream
from .config import MoEConfig
from .scalars import whole

ROUTER_STREAM, EXPERT_STREAM = 0, 1
EXPERT_ARRAYS = ("gate_proj", "up_proj", "down_proj", "gate_bias", "up_bias", "down_bias")  # have an index of experts
EXTRAS = ("router_bias", "selection_bias", "expert_scale", "result_scale")  # every rank holds them, as the router


@dataclass(frozen=True, kw_only=True, eq=False)
class Weights:
    """Router and `n` consecutive experts, the first of which is expert `first_expert` of the layer.

    Args:
        router: `[num_experts, hidden]`, always of all experts.
        up_proj: `[n, ffn, hidden]`.
        down_proj: `[n, hidden, ffn]`.
        gate_proj: `[n, ffn, hidden]`, for gated experts only.
        gate_bias, up_bias: `[n, ffn]`, each optional.
        down_bias: `[n, hidden]`, optional.
        router_bias: `[num_experts]`, where the kind of router has logit_bias.
        selection_bias: `[num_experts - num_always]`, where it has selection_bias.
        expert_scale: `[num_experts]`, where it has expert_scale.
        result_scale: `[hidden]`, where the kind of expert has norm_eps.
        first_expert: global index of the first expert present.
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

    @classmethod
    def random(cls, config: MoEConfig, seed: int = 0, bias: bool = False, experts: range | None = None) -> Weights:
        """Normal weights of standard deviation `1 / sqrt(fan_in)`; biases, if asked for, have that of their matrix.

        What the kinds of router and expert ask for besides is there, too, and changes results. Each expert has its own
        stream, so `experts=range(a, b)` makes exactly that slice of the full set.
        """
        experts = _check_experts(experts, config)
        ends = ("proj", "bias") if bias else ("proj",)
        names = [f"{projection}_{end}" for end in ends for projection in config.expert_kind.projections]
        shapes = _expert_shapes(config)
        arrays = {name: np.empty((len(experts), *shapes[name]), config.weight_format.dtype) for name in names}
        for position, expert in enumerate(experts):
            normal = stream(seed, EXPERT_STREAM, expert)
            for name, array in arrays.items():
                fan_in = config.ffn if name.startswith("down") else config.hidden
                array[position] = _scaled_normal(normal, shapes[name], fan_in, config)
        router = _scaled_normal(stream(seed, ROUTER_STREAM), (config.num_experts, config.hidden), config.hidden, config)
        return cls(router=router, first_expert=experts.start, **arrays, **_random_extras(config, seed))

    @property
    def num_experts(self) -> int:
        """Experts present here, of `router.shape[0]` in the layer."""
        return len(self.up_proj)

    @property
    def ups(self) -> list[tuple[Array, Array | None]]:
        """The up matrices with their biases, in the order of kernels: gate first, if there is one."""
        gate = [] if self.gate_proj is None else [(self.gate_proj, self.gate_bias)]
        return [*gate, (self.up_proj, self.up_bias)]

    @property
    def num_bytes(self) -> int:
        extras = [getattr(self, name) for name in EXTRAS]
        arrays = [self.router, *self._experts().values(), *(array for array in extras if array is not None)]
        return sum(array.nbytes for array in arrays)

    def shard(self, rank_idx: int, num_ranks: int) -> Weights:
        """The experts that live on `rank_idx` of `num_ranks`, as views.

        Raises:
            TypeError, ValueError: no integers; num_ranks does not divide the experts, rank_idx is no rank, or its
                experts are not present.
        """
        total = len(self.router)
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
        return replace(self, first_expert=first, **{name: a[start:stop] for name, a in self._experts().items()})

    def check(self, config: MoEConfig) -> None:
        """Nothing, if these weights fit `config`.

        Raises:
            TypeError, ValueError: naming the array, what it is and what the config asks for.
        """
        shapes = _expert_shapes(config)
        check_array("router", self.router, (config.num_experts, config.hidden))
        if self.router.dtype not in (config.weight_format.dtype, np.dtype(np.float32)):
            raise TypeError(f"router must have dtype {config.weight_format.name} or float32, got {self.router.dtype}")
        self._check_optional(config)
        self._check_extras(config)
        num_present = len(check_array("up_proj", self.up_proj, (None, *shapes["up_proj"])))
        for name, array in self._experts().items():
            check_array(name, array, (num_present, *shapes[name]))
            if array.dtype != config.weight_format.dtype:
                raise TypeError(f"{name} must have config's dtype {config.weight_format.name}, got {array.dtype}")
        last = config.num_experts - num_present
        if not 0 <= self.first_expert <= last:
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
        for name in ("gate_proj", "gate_bias"):
            if not gated and getattr(self, name) is not None:
                raise ValueError(f"{name} is given, but config's experts are not gated")

    def _check_extras(self, config: MoEConfig) -> None:
        shapes = _extra_shapes(config)
        for name in EXTRAS:
            array = getattr(self, name)
            if (array is None) != (name not in shapes):
                state, wanted = ("missing", "asks for it") if array is None else ("given", "has none")
                raise ValueError(f"{name} is {state}, but config's kind of {_KIND_OF[name]} {wanted}")
            if array is None:
                continue
            check_floating(name, check_array(name, array, shapes[name]))
            if not np.isfinite(array.astype(np.float64)).all():  # or the choice of every token would be spoilt
                raise ValueError(f"{name} must be finite, got {array[~np.isfinite(array.astype(np.float64))][0]}")

    def _experts(self) -> dict[str, Array]:
        """Every array that has an expert index, by name."""
        return {name: getattr(self, name) for name in EXPERT_ARRAYS if getattr(self, name) is not None}


def _expert_shapes(config: MoEConfig) -> dict[str, tuple[int, ...]]:
    up, down = (config.ffn, config.hidden), (config.hidden, config.ffn)
    shapes: dict[str, tuple[int, ...]] = {"gate_proj": up, "up_proj": up, "down_proj": down}
    return shapes | {"gate_bias": up[:1], "up_bias": up[:1], "down_bias": down[:1]}


_KIND_OF = dict.fromkeys(EXTRAS, "router") | {"result_scale": "expert"}


def _extra_shapes(config: MoEConfig) -> dict[str, tuple[int]]:
    """Of those of EXTRAS that the config's kinds ask for."""
    router, chosen_from = config.router_kind, config.num_experts - config.router_kind.num_always
    asked = {
        "router_bias": (router.logit_bias, config.num_experts),
        "selection_bias": (router.selection_bias, chosen_from),
        "expert_scale": (router.expert_scale, config.num_experts),
        "result_scale": (config.expert_kind.norm_eps is not None, config.hidden),
    }
    return {name: (size,) for name, (is_asked, size) in asked.items() if is_asked}


def _random_extras(config: MoEConfig, seed: int) -> dict[str, Array]:
    """Biases of about the size of what they are added to, and scales around 1."""
    kind, extras = config.router_kind, {}
    for name, shape in _extra_shapes(config).items():
        normal = stream(seed, ROUTER_STREAM, EXTRAS.index(name)).standard_normal(shape)
        if name.endswith("_scale"):
            values = 1 + normal / 4
        elif name == "selection_bias" and kind.choice == "score" and kind.score == "softmax":
            values = normal / config.num_experts
        else:
            values = normal / 4
        extras[name] = values.astype(config.accumulator)
    return extras


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
