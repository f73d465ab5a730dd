"""Which family of the table a module of transformers is of, and what its block does that is not of the layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from reference.families import Family, family_names, read_family
from reference.families.layer_config import expert_kind

from ..checkpoints.layers import Asked, LayerPlan, plan_layer
from ..checkpoints.models import find_families
from ..checkpoints.tensor_file import TensorInfo
from .description import NUM_TOKENS, TILES

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def _same(block: Any, y: Any) -> Any:
    return y


def _nothing(block: Any, **inputs: Any) -> dict[str, torch.Tensor]:
    return {}


@dataclass(frozen=True)
class Outside:
    """What a block does around the layer.

    Args:
        given: `topk_idx`, `[num_tokens, num_topk]`, of the block and what it is called with beside tokens.
        finish: what the block returns, of the block and the layer's result, which is shaped like the tokens.
    """

    given: Callable[..., dict[str, torch.Tensor]] = _nothing
    finish: Callable[[Any, torch.Tensor], Any] = _same


def _of_token_ids(block: Any, input_ids: torch.Tensor | None = None, **_: Any) -> dict[str, torch.Tensor]:
    if input_ids is None:
        raise ValueError("input_ids must be given, because experts are chosen by a table of token ids; got None")
    return {"topk_idx": block.gate.tid2eid[input_ids.reshape(-1)]}


def _with_none(block: Any, y: torch.Tensor) -> Any:
    """Where a block returns its scores, too, which the layer does not show."""
    return y, None


PLAIN = Outside()
OUTSIDE = {
    "axk1": Outside(finish=lambda block, y: block.post_mlp_layernorm(y)),
    "cohere2_moe": PLAIN,  # what is outside for some configs, the table refuses
    "deepseek_v4_hash": Outside(given=_of_token_ids),
    "gpt_oss": Outside(finish=_with_none),
    "jetmoe": Outside(finish=lambda block, y: y + block.bias),
    "llama4": Outside(finish=lambda block, y: (y.flatten(0, -2), None)),
    "openai_privacy_filter": Outside(finish=_with_none),
}


def families_of_block(block: nn.Module) -> list[Family]:
    """Those with that class of block; most have one, some two."""
    return list(_by_block().get(_class_name(type(block)), []))


def plan_block(block: nn.Module, model: Mapping[str, Any], layer: int) -> tuple[Family, LayerPlan]:
    """The family of a block, and which of its tensors are which arrays of the layer.

    Args:
        model: the model's config.
        layer: the block's index, where the config has a value for each.

    Raises:
        NotImplementedError: naming what the block is, and why it is none of the layer's.
    """
    why = "its class is none that is known"
    asked = Asked(layer=layer, own=dict(num_tokens=NUM_TOKENS, **TILES))
    for family in families_of_block(block):
        if family.outside and family.name not in OUTSIDE:
            why = f"outside of the layer it has {family.outside}"
            continue
        try:
            (found,), part = find_families(model, family.name)
            return found, plan_layer(_Tensors(block), "state", found, part, asked)
        except ValueError as error:
            why = str(error)
    raise NotImplementedError(f"{type(block).__name__} cannot be computed by FlashMoE: {why}")


def outside_of(family: Family) -> Outside:
    return OUTSIDE.get(family.name, PLAIN)


@torch.compiler.assume_constant_result
def expert_kind_of(experts: Any) -> str | None:
    """What a decorated experts module computes by the table: the fields of its `ExpertKind` as text; None: not there.

    The gate of such a module is a method of its own. All layers of a model have the same, whose tables are by layer.
    """
    module = _class_name(type(experts)).partition(".")[0]
    families = [family for block, found in _by_block().items() if block.startswith(f"{module}.") for family in found]
    if not families or not hasattr(experts, "config"):
        return None
    model = experts.config.to_dict()
    _, part = find_families(model, families[0].name)
    return repr(vars(expert_kind(families[0].section("experts", part))))


class _Tensors:
    """Names and shapes of a block's tensors, for a plan: nothing of them is read."""

    bytes_read = 0

    def __init__(self, block: nn.Module) -> None:
        self._tensors = block.state_dict(keep_vars=True)
        self.names = self._tensors.keys()

    def where(self, name: str) -> str:
        """For messages."""
        return "block"

    def info(self, name: str) -> TensorInfo:
        tensor = self._tensors[name]
        return TensorInfo(dtype=DTYPES.get(tensor.dtype, str(tensor.dtype)), shape=tuple(tensor.shape), begin=0, end=0)

    def read(self, name: str, piece: int, num_pieces: int) -> Any:
        raise NotImplementedError("a plan reads nothing")


def _class_name(kind: type[Any]) -> str:
    """As families' files have it: "mixtral.MixtralSparseMoeBlock"; of another class than transformers', nothing."""
    match = re.fullmatch(r"transformers\.models\.(\w+)\.\w+", kind.__module__)
    return f"{match[1]}.{kind.__name__}" if match else ""


@cache
def _by_block() -> dict[str, list[Family]]:
    found: dict[str, list[Family]] = {}
    for family in map(read_family, family_names()):
        if family.block:
            found.setdefault(family.block, []).append(family)
    return found
