"""The `MoEConfig` of a layer of a public model, from the model's config and its family's file.

Beside the fields of `RouterKind`, `ExpertKind` and `MoEConfig`'s sizes the sections take the words of public configs
(`WORDS`), 0 where a limit or a cap is none, and norms and groups that are not used. [shared] has `ffn`, `gate`, and
those fields of `ExpertKind` in which the shared expert differs from the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import MoEConfig
from ..layer_kinds import ExpertKind, RouterKind
from ..scalars import whole
from . import Family

WORDS = {"sqrtsoftplus": "sqrt_softplus", "gelu_pytorch_tanh": "gelu_tanh", "swish": "silu"}
LIMITS = ("gate_limit", "up_limit", "logit_cap")
GROUPS = ("num_groups", "num_topk_groups", "group_score", "group_fill")
SHORT = {"renormalize", "gated", "activation"}
NORMS = ("norm_order", "norm_eps", "norm_min")


def layer_config(family: Family, model: Mapping[str, Any], layer: int = 0, **own: Any) -> MoEConfig:
    """The config of one layer.

    Args:
        model: what is in the model's config.json, or the part of it that describes the language model.
        layer: its index in the model, where the config has a value for each.
        own: fields of `MoEConfig` that a model's config does not have, or in place of what it says; kinds as a whole
            (`router`, `expert`), whose short spelling (`renormalize`, `gated`, `activation`) must agree with them.

    Raises:
        TypeError, ValueError: naming what the model's config lacks, or what is wrong.
    """
    fields = _section(family, "sizes", model, layer)
    if "router" not in own:
        fields["router"] = router_kind(_section(family, "router", model, layer))
    expert = expert_kind(_section(family, "experts", model, layer))
    fields["expert"] = expert
    shared = _section(family, "shared", model, layer)
    fields["shared_ffn"] = whole("shared_ffn", shared.pop("ffn", 0))
    fields["shared_gate"] = shared.pop("gate", False) and fields["shared_ffn"] > 0
    if shared and fields["shared_ffn"]:
        other = expert_kind(_kind_fields(expert) | shared)
        fields["shared_expert"] = None if other == expert else other
    config = MoEConfig(**(fields | own))
    for name in SHORT & set(own):  # of those that have their default MoEConfig cannot tell that they were given
        field = "router" if name == "renormalize" else "expert"
        kind = getattr(config, f"{field}_kind")
        if own[name] != getattr(kind, name):
            rule = f"{name} must be what family {family.name!r} says, {getattr(kind, name)}"
            raise ValueError(f"{rule}, unless {field} is given; got {own[name]}")
    return config


def router_kind(section: Mapping[str, Any]) -> RouterKind:
    """Of a section [router]."""
    fields = _plain(section)
    if not fields.get("renormalize", False):
        fields = {key: value for key, value in fields.items() if key not in NORMS}
    if fields.get("num_groups") == 1:
        fields = {key: value for key, value in fields.items() if key not in GROUPS}
    return RouterKind(**fields)


def expert_kind(section: Mapping[str, Any]) -> ExpertKind:
    """Of a section [experts]."""
    fields = _plain(section)
    limited = fields.get("gate_limit") or fields.get("up_limit")
    if fields.get("bound", "none") != "softcap" and not limited:
        fields["bound"] = "none"
    return ExpertKind(**fields)


def _section(family: Family, name: str, model: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """Its values; of a list in the file it is that of the layer."""
    values = family.section(name, model, layer)
    for key, value in values.items():
        if isinstance(value, list) and layer >= len(value):
            raise ValueError(f"family {family.name!r}: [{name}] {key} must have a value for layer {layer}, got {value}")
    return {key: value[layer] if isinstance(value, list) else value for key, value in values.items()}


def _kind_fields(kind: ExpertKind) -> dict[str, Any]:
    return {name: getattr(kind, name) for name in ExpertKind.__dataclass_fields__}


def _plain(section: Mapping[str, Any]) -> dict[str, Any]:
    fields = {key: WORDS.get(value, value) if isinstance(value, str) else value for key, value in section.items()}
    return {key: None if key in LIMITS and not value else value for key, value in fields.items()}
