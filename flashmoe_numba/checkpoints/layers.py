"""One layer from wherever its tensors are: its config, and its weights or those of one rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from reference import DTYPES, MoEConfig, Weights
from reference.arrays import Array
from reference.families import Family
from reference.families.layer_config import layer_config
from reference.formats import FORMATS
from reference.router_extras import EXTRAS
from reference.scalars import check_one_of, check_whole, is_whole, whole

from . import fp8
from .entries import STORED, Entry, arrays_of
from .models import Model
from .names import names_of
from .reading import Reader
from .stored import Source, Stored

QUANTISED = ("fp8", "mxfp4")
IN_SUMS = ("router", "shared_gate_weight", *EXTRAS)  # not multiplied as experts are


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Which layer, and how.

    Args:
        layer: its index in the model.
        rank_idx: whose experts are read; None: all.
        dtype: as `MoEConfig` has it; None: as experts are stored, or if that is quantised, as the model computes.
        own: fields of `MoEConfig` that are not in a model's config, or in place of what it says.
    """

    layer: int
    rank_idx: int | None = None
    dtype: str | None = None
    own: Mapping[str, Any]

    def __post_init__(self) -> None:
        check_whole("layer", self.layer, 0)


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """Which tensors become which arrays of one layer; all that can be known of them before they are read is checked.

    Args:
        arrays: the entry of each array.
        tensors: of each entry.
    """

    config: MoEConfig
    reader: Reader
    arrays: Mapping[str, Entry]
    tensors: Mapping[Entry, list[Stored]]

    def read(self) -> Weights:
        """The weights."""
        found: dict[str, Array] = {}
        for entry, tensors in self.tensors.items():
            found |= self.reader.read(entry, tensors, _dtype_of(entry, tensors[0], self.config.dtype))
        fields: dict[str, Any] = {name: found[name] for name in self.arrays}
        weights = Weights(first_expert=self.reader.experts.start, num_zero=self.config.num_zero, **fields)
        weights.check(self.config)
        return weights


def plan_layer(source: Source, section: str, family: Family, model: Model, asked: Asked) -> LayerPlan:
    """The layer that is asked for, whose tensors are called as this section of the family's file says.

    Raises:
        TypeError, ValueError, FileNotFoundError: naming what is wrong.
    """
    names = names_of(family, section, model)
    if section == "disk":
        names.check_numbered(asked.layer)
    config = layer_config(family, model, asked.layer, **{"num_ranks": 1, **asked.own})
    experts = _experts_of(asked.rank_idx, config)
    prefix = names.prefix(asked.layer, source.names)
    chosen = names.choose(absent_arrays(config), prefix, source.names, experts.start)
    unclaimed = names.unclaimed(chosen, prefix, source.names, config.num_experts)
    if unclaimed:
        rule = f"family {family.name!r} must say what every tensor of the block is"
        raise ValueError(f"{rule}, and knows nothing of {', '.join(unclaimed[:3])} ({len(unclaimed)} in all)")
    reader = Reader(source=source, prefix=prefix, sizes=_sizes(config), experts=experts, block=_block(model))
    tensors = {entry: reader.plan(entry) for entry in dict.fromkeys(chosen.values())}
    dtype = asked.dtype or _stored_dtype(source, tensors, model)
    return LayerPlan(config=replace(config, dtype=dtype), reader=reader, arrays=chosen, tensors=tensors)


def plan_first(source: Source, section: str, families: Sequence[Family], model: Model, asked: Asked) -> LayerPlan:
    """The same of the first of several families that fits: a model_type may have several kinds of block.

    Raises:
        ValueError: none fits, says why of each.
    """
    errors: dict[str, ValueError] = {}
    for family in families:
        try:
            return plan_layer(source, section, family, model, asked)
        except ValueError as error:
            errors[family.name] = error
    first, *others = errors.values()
    if all(str(other) == str(first) for other in others):
        raise first
    reasons = "; ".join(f"not {name}, because {error}" for name, error in errors.items())
    raise ValueError(f"the layer is of none of its model's families: {reasons}")


def absent_arrays(config: MoEConfig) -> Set[str]:
    """Those of `Weights` that a layer of this kind has not, by their names."""
    router, expert = config.router_kind, config.expert_kind
    asked = {"router_bias": router.logit_bias, "selection_bias": router.selection_bias}
    asked |= {"expert_scale": router.expert_scale, "result_scale": expert.norm_eps is not None}
    asked |= dict.fromkeys(("gate_proj", "gate_bias", "shared_gate_proj", "shared_gate_bias"), expert.gated)
    asked |= {"shared_gate_weight": config.shared_gate}
    if config.shared_ffn == 0:
        asked |= {array: False for field in STORED if field.startswith("shared_") for array in arrays_of(field)}
    return {name for name, there in asked.items() if not there}


def _sizes(config: MoEConfig) -> dict[str, int]:
    """Lengths of axes by their names in entries."""
    sizes = {"expert": config.num_experts, "choice": config.num_choices, "hidden": config.hidden}
    return sizes | {"ffn": config.ffn, "shared": config.shared_ffn}


def _experts_of(rank_idx: int | None, config: MoEConfig) -> range:
    if rank_idx is None:
        return range(config.num_experts)
    if not 0 <= whole("rank_idx", rank_idx) < config.num_ranks:
        raise ValueError(f"rank_idx must be in [0, num_ranks={config.num_ranks}), got {rank_idx}")
    first = rank_idx * config.num_experts_per_rank
    return range(first, first + config.num_experts_per_rank)


def _dtype_of(entry: Entry, tensor: Stored, experts: str) -> str:
    """The number format of an array. What is only added up stays as it is stored, or is in that of sums."""
    if entry.field not in IN_SUMS or tensor.dtype == experts:
        return experts
    return FORMATS[experts].accumulator


def _stored_dtype(source: Source, tensors: Mapping[Entry, list[Stored]], model: Model) -> str:
    """What all matrices of experts are stored in, or where they are quantised, what the model computes in.

    Raises:
        ValueError: they are of several types; names one tensor of each of two.
    """
    found: dict[str, Stored] = {}
    for entry in tensors:
        if entry.field.endswith("_proj"):
            for tensor in tensors[entry]:
                found.setdefault(tensor.dtype or _computed_dtype(model), tensor)
    (dtype, first), *others = found.items()
    if others:
        rule = f"dtype must be given, because experts are stored in several: tensor {first.name!r} is {dtype}"
        raise ValueError(f"{source.where(others[0][1].name)}: {rule}, {others[0][1].name!r} {others[0][0]}")
    return dtype


def _block(model: Model) -> tuple[int, int]:
    """Rows and columns of a block of 8-bit weights.

    Raises:
        ValueError: the model is quantised in another way, or what it says of it has another form.
    """
    how = model.get("quantization_config") or {}
    if not isinstance(how, Mapping):
        raise ValueError(f"quantization_config must be a table, got {how!r}")
    if how:
        check_one_of("quantization_config.quant_method", how.get("quant_method"), QUANTISED)
    block = how.get("weight_block_size") or fp8.BLOCK
    if not isinstance(block, list | tuple) or len(block) != 2 or not all(is_whole(n) and n > 0 for n in block):
        raise ValueError(f"quantization_config.weight_block_size must be two integers above 0, got {block!r}")
    return block[0], block[1]


def _computed_dtype(model: Model) -> str:
    """What the model computes in, or what most do."""
    named = str(model.get("dtype") or model.get("torch_dtype")).removeprefix("torch.")
    return named if named in DTYPES else "bfloat16"
