"""What must hold of a public block's record and the layer that we make of the block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from golden.record import Record

from reference import ExpertKind, MoEConfig, RouterKind, Routing, Weights, check_routing, max_rel_error, moe_layer
from reference import tolerance as float32_tolerance
from reference.families import read_family
from reference.layer import source_routings
from reference.router_extras import EXTRAS, asked_extras

# What a kind cannot be without; and 1e-20, which changes no bit.
KEPT = {"router": ("score", "choice", "num_always", "norm_eps"), "expert": ("activation", "gated")}
EXACT = 1e-12  # of a block that computes in float64, with its routing given


def own_routing(record: Record, config: MoEConfig, weights: Weights) -> Routing:
    """Ours, in float64."""
    logits = record.logits if record.logits.size else None
    (routing,) = source_routings([record.x], weights, config, record.given_idx, None, logits)
    return routing


def in_our_order(record: Record, ours: Routing) -> Routing:
    """The block's routing with the experts of each token in our order; raises where they are others."""
    idx, order = record.topk_idx.astype(np.int64), np.argsort(record.topk_idx, axis=1, kind="stable")
    place = np.argsort(np.argsort(ours.topk_idx, axis=1, kind="stable"), axis=1)
    if record.family == "inkling":  # the shared experts come after those that the block tells of
        place = place[:, : idx.shape[1]]
    sort = np.take_along_axis(order, place, axis=1)
    topk_idx, factors = (np.take_along_axis(values, sort, axis=1) for values in (idx, record.topk_weights))
    if record.family == "inkling":
        topk_idx = np.concatenate([topk_idx, ours.topk_idx[:, idx.shape[1] :]], axis=1)
        factors = np.concatenate([factors, ours.topk_weights[:, idx.shape[1] :]], axis=1)
    factors = np.where((topk_idx == 8) & (record.family == "zaya"), ours.topk_weights, factors)
    np.testing.assert_array_equal(topk_idx, ours.topk_idx, f"{record.family}: experts of a token")
    return Routing(topk_idx.astype(np.int32), factors)


def errors(record: Record) -> dict[str, float]:
    """Greatest relative errors: of weights, of results with the block's routing, with our own, and of its float32."""
    config, weights = record.layer()
    ours = own_routing(record, config, weights)
    theirs = in_our_order(record, ours)
    given = moe_layer(record.x, weights, config, topk_idx=theirs.topk_idx, topk_weights=theirs.topk_weights)
    own = moe_layer(record.x, weights, config, topk_idx=ours.topk_idx, topk_weights=ours.topk_weights)
    return {
        "weights": max_rel_error(theirs.topk_weights, ours.topk_weights),
        "given": max_rel_error(record.y, given),
        "own": max_rel_error(record.y, own),
        "float32": max_rel_error(record.y32, own),
    }


def assert_same(record: Record) -> None:
    """With the block's routing in float64, where it computes in float64, and with our own within float32."""
    found = errors(record)
    exact = read_family(record.family).sections["tested"]["float64"]
    assert found["given"] <= (EXACT if exact else tolerance(record)), found
    assert max(found["own"], found["float32"], found["weights"]) <= tolerance(record), found
    complaint = judge(record)
    assert complaint is None, complaint


def judge(record: Record) -> str | None:
    """What `check_routing` says of the block's routing, made in float32, if its router is a matrix on these tokens."""
    config, weights = record.layer()
    if record.logits.size:
        return None
    theirs = in_our_order(record, own_routing(record, config, weights))
    return check_routing(theirs, record.x, weights, replace(config, dtype="float32"))


def tolerance(record: Record) -> float:
    """Of a layer in float32."""
    config, _ = record.layer()
    return float32_tolerance(replace(config, dtype="float32"))


def without(config: MoEConfig) -> Iterator[tuple[str, MoEConfig]]:
    """The config without each of what its kinds have, by the field's name."""
    for field, kind in (("router", config.router_kind), ("expert", config.expert_kind)):
        for name, about in type(kind).__dataclass_fields__.items():
            if getattr(kind, name) != about.default and name not in KEPT[field]:
                yield name, replace(config, **{field: _less(kind, name, about.default)})
    if config.num_zero and config.zero == "identity":
        yield "zero", replace(config, zero="none")


def _less(kind: RouterKind | ExpertKind, name: str, default: object) -> RouterKind | ExpertKind:
    fields = {
        "renormalize": {"norm_order": 1.0, "norm_eps": 0.0, "norm_min": 0.0},
        "num_groups": {"num_topk_groups": 1},
        "num_topk_groups": {"num_groups": 1},
        "bound": {"gate_limit": None, "up_limit": None},
    }.get(name, {})
    if name in ("gate_limit", "up_limit") and getattr(kind, "bound", "") == "softcap":
        default = 1e6
    return replace(kind, **({name: default} | fields))


def changes(record: Record, config: MoEConfig, less: MoEConfig, weights: Weights) -> bool:
    """Is anything else without it?"""
    asked = {name for name, _, _ in asked_extras(less)}
    fewer = replace(weights, **{name: getattr(weights, name) if name in asked else None for name in EXTRAS})
    whole, part = own_routing(record, config, weights), own_routing(record, less, fewer)
    results = [
        moe_layer(record.x, w, c, topk_idx=r.topk_idx, topk_weights=r.topk_weights)
        for w, c, r in ((weights, config, whole), (fewer, less, part))
    ]
    return not np.allclose(*results, rtol=1e-9, atol=1e-12)
