"""One step of a whole model that decodes: the simulated layer as often as the model has it, all else by roofline.

Every rank has `num_tokens` sequences and makes the next token of each. Attention, dense layers and the head are whole
on every rank (data parallel), experts are spread. A part takes the longer of two: its operations at the tensor peak,
and its bytes at the memory's achieved bandwidth; parts and layers come one after the other:

    projections   2 T W operations, W weights read; W of all matrices of attention
    attention     2 T C H (K + V) operations, T C cached elements read; C the context, or a layer's window if less;
                  H heads, K and V the lengths of a key and a value. Latent attention (MLA) reads the latent row, with
                  the up-projections absorbed: K = rank + rope, V = rank
    dense layers  2 T W operations, W weights read
    head          the same, of vocabulary x hidden

Elements are those of the layer's precision: weights, and rows for what is cached. Leaves out: norms, rotations,
residuals, sampling, launches outside of the MoE layer, overlap of any two parts, tensor parallelism, prefill,
speculation, shared experts that the simulated layer does not have, and that kernels do not reach a roofline: what is
added to the simulated layers is a lower bound.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..drafting.roof import memory_ns, products_ns
from ..simulation import Simulation
from ..world.model_shape import Shape
from ..world.world import FORWARD, World


@dataclass(frozen=True, kw_only=True)
class ModelStep:
    """Args:
    layers, moe_layers: of the model, and those of them that are the simulated layer.
    context: tokens that each sequence has already.
    projections_us, attention_us, dense_us, head_us: by roofline; moe_us: simulated.
    tpot_ms: time per output token, the sum.
    tokens_per_s_per_gpu: of one rank.
    memory_gb: weights, cache and rows of the busiest rank.
    basis: for whoever finds the numbers alone.
    """

    layers: int
    moe_layers: int
    context: int
    projections_us: float
    attention_us: float
    dense_us: float
    head_us: float
    moe_us: float
    tpot_ms: float
    tokens_per_s_per_gpu: float
    memory_gb: float
    basis: str = "roofline + simulation"


def model_step(simulation: Simulation, shape: Shape, context: int) -> ModelStep:
    """The step whose every MoE layer takes what was simulated.

    Raises:
        ValueError: the model is of another hidden size, does not fit the memory, or a backward was simulated.
    """
    world = simulation.world
    if world.passes != FORWARD:
        raise ValueError(f"passes must be {FORWARD} for a step that decodes, got {world.passes}")
    if shape.hidden != world.config.hidden:
        raise ValueError(f"hidden must be the model's {shape.hidden}, got {world.config.hidden}")
    layers, tokens = len(shape.dense), world.config.num_tokens
    contexts = sum(context if window is None else min(context, window) for window in shape.windows)
    cache = tokens * contexts * shape.cached * world.precision.token_bytes
    times = {
        "projections_us": layers * _dense_us(world, shape.projection_weights),
        "attention_us": _roof_us(world, 2 * tokens * contexts * shape.num_heads * shape.key_and_value, cache),
        "dense_us": sum(shape.dense) * _dense_us(world, _dense_weights(world, shape)),
        "head_us": _dense_us(world, shape.vocab * shape.hidden),
        "moe_us": (layers - sum(shape.dense)) * simulation.latency_us,
    }
    step_us = sum(times.values())
    return ModelStep(
        layers=layers,
        moe_layers=layers - sum(shape.dense),
        context=context,
        projections_us=times["projections_us"],
        attention_us=times["attention_us"],
        dense_us=times["dense_us"],
        head_us=times["head_us"],
        moe_us=times["moe_us"],
        tpot_ms=step_us / 1000,
        tokens_per_s_per_gpu=tokens / step_us * 1e6,
        memory_gb=_memory_gb(world, shape, cache),
    )


def _memory_gb(world: World, shape: Shape, cache: float) -> float:
    """What the busiest rank holds."""
    layers, dense = len(shape.dense), sum(shape.dense)
    weights = layers * shape.projection_weights + dense * _dense_weights(world, shape)
    weights += shape.vocab * shape.hidden * (1 if shape.tied else 2)
    experts = (layers - dense) * world.weight_bytes
    needed = (weights * world.precision.weight_bytes + experts + cache + world.row_bytes) / 1e9
    if needed > world.hardware.hbm_gb:
        parts = f"experts {experts / 1e9:.1f}, cache {cache / 1e9:.1f}"
        there = f"{world.hardware.name} has {world.hardware.hbm_gb:g}"
        rule = "take more ranks, fewer layers or tokens, a shorter context or a smaller precision"
        raise ValueError(f"{layers} layers need {needed:.1f} GB on the busiest rank ({parts}), and {there}: {rule}")
    return needed


def _dense_weights(world: World, shape: Shape) -> int:
    return shape.hidden * shape.dense_ffn * world.config.expert_kind.num_matrices


def _dense_us(world: World, weights: int) -> float:
    """All tokens of a rank times matrices of so many weights."""
    return _roof_us(world, 2 * world.config.num_tokens * weights, weights * world.precision.weight_bytes)


def _roof_us(world: World, operations: float, nbytes: float) -> float:
    return float(max(products_ns(world, operations), memory_ns(world, nbytes))) / 1000
