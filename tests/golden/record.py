"""What a public block made of its tokens, as a file keeps it, and the layer that we make of the same block."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from golden.tensors import VOCAB, state, tensor, tokens

from flashmoe_numba.checkpoints import from_state_dict
from reference import MoEConfig, Weights
from reference.families import read_family
from reference.families.layer_config import layer_config
from reference.router_extras import asked_extras

LAYER = 1
RECORDS = Path(__file__).parent / "records"


@dataclass(frozen=True, eq=False)
class Record:
    """One case.

    Args:
        family: its name.
        about: JSON: the version of the library, `model` (its config), `shapes` of the block's tensors, `salt`.
        rows: float64, what the experts get, where that is not the block's tokens; else empty.
        logits: float64, where the router is no matrix on the experts' tokens; else empty.
        topk_idx, topk_weights: of the block in float64.
        y: of the block in float64; y32: in float32.
    """

    family: str
    about: str
    rows: np.ndarray
    logits: np.ndarray
    topk_idx: np.ndarray
    topk_weights: np.ndarray
    y: np.ndarray
    y32: np.ndarray

    @classmethod
    def read(cls, path: Path) -> Record:
        with np.load(path, allow_pickle=False) as file:
            values = {field.name: file[field.name] for field in fields(cls)}
        return cls(**values | {name: str(values[name]) for name in ("family", "about")})

    def write(self, path: Path) -> None:
        np.savez_compressed(path, **{f.name: np.asarray(getattr(self, f.name)) for f in fields(self)})

    @property
    def model(self) -> dict[str, Any]:
        model: dict[str, Any] = json.loads(self.about)["model"]
        return model

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The block's tensors."""
        about = json.loads(self.about)
        return state(about["shapes"], 8, about["salt"])

    @property
    def x(self) -> np.ndarray:
        """What the experts get, `[num_tokens, hidden]`."""
        return self.rows if self.rows.size else tokens(*self.y.shape)

    @property
    def given_idx(self) -> np.ndarray | None:
        """Experts from the table of token ids, for a router that has one."""
        if self.family != "deepseek_v4_hash":
            return None
        return tensor("gate.tid2eid", (VOCAB, 3), 8, json.loads(self.about)["salt"])[np.arange(len(self.y)) * 3]

    def layer(self) -> tuple[MoEConfig, Weights]:
        """In float64."""
        family, sizes = read_family(self.family), {"num_tokens": len(self.y), "layer": LAYER, "dtype": "float64"}
        if "not_read" not in family.sections["state"]:
            return from_state_dict(self.model, self.arrays, family=self.family, **sizes)
        config = layer_config(family, self.model, num_ranks=1, **sizes)
        return config, _weights(self.family, self.arrays, config)


def _weights(family: str, arrays: dict[str, np.ndarray], config: MoEConfig) -> Weights:
    """Of blocks that are not read from their states; see the families' files."""
    made: dict[str, Any] = {"num_zero": config.num_zero, "router": np.zeros((config.num_choices, config.hidden))}
    for name, _, shape in asked_extras(config):
        made[name] = np.ones(shape)
    if family == "inkling":
        shared = {n: arrays[f"shared_experts.{n}_proj"] for n in ("gate", "up", "down")}
        gate, up = np.split(arrays["experts.gate_up_proj"], 2, axis=1)
        routed = {"gate": gate, "up": up, "down": arrays["experts.down_proj"]}
        made |= {f"{n}_proj": np.concatenate([routed[n], shared[n]]) for n in routed}
        made["router"], made["selection_bias"] = arrays["gate.weight"], arrays["gate.e_score_correction_bias"]
        made["expert_scale"] = np.repeat(arrays["gate.global_scale"], config.num_choices)
        return Weights(**made)
    if config.expert_kind.gated:
        made["gate_proj"], made["up_proj"] = np.split(arrays["experts.gate_up_proj"], 2, axis=1)
    else:
        made["up_proj"] = arrays["experts.up_proj"]
    made["down_proj"] = arrays["experts.down_proj"]
    if family == "muse_spark":
        made["result_scale"] = 1 + arrays["experts.post_expert_norm.weight"]
    bias = {"zaya": "gate.balancing_biases"}.get(family, "gate.e_score_correction_bias")
    made["selection_bias"] = arrays[bias]
    return Weights(**made)
