"""What the studies of the simulator share: worlds by name, equal terms for all schedules, and titles.

Equal terms: the policies' own tiles and fitted rates say how fast published kernels are; a study of schedules gives all
of them the same tiles and the same share of the tensor peak, so that what differs is the order of the work. The row
tiles that MegaMoE chooses by load belong to its schedule, but are no higher than the others'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sim import PolicyKnobs, Scenario, SimRouting, World, load_hardware, load_preset, make_knobs
from sim.policies import SAME, megamoe

TILE_M, RATE = SAME["tile_m"], SAME["rate"]
PRECISION = "bfloat16"
PUBLISHED = {"packing": "per_source"}  # what the studies call FlashMoE
PACKED = {"packing": "per_expert", "ladder": True}  # and FlashMoE packed, had all counts been known before
PRESETS = {"scout": "llama-4-scout", "olmoe": "olmoe-1b-7b", "deepseek-v3-like": "deepseek-v3"}


def world_of(preset: str, hardware: str, tokens: int, routing: str | SimRouting = "even") -> World:
    """A model's layer with so many tokens on each GPU, without its shared expert; all GPUs of the hardware are ranks.

    Raises:
        ValueError: the machine cannot hold it, or the experts cannot be divided among its GPUs.
    """
    machine = load_hardware(hardware)
    config = load_preset(PRESETS.get(preset, preset), num_ranks=machine.num_gpus, num_tokens=tokens, shared_ffn=0)
    return Scenario(config=config, hardware=machine, routing=routing, precision=PRECISION).make()


def equal_terms(policy: str, world: World, changes: Mapping[str, Any] | None = None) -> PolicyKnobs:
    """The policy's knobs with the tiles and the rate that all get, and then `changes`."""
    lower = {"tile_m": min(TILE_M, megamoe.tile_height(world, megamoe.Knobs()))} if policy == "megamoe" else {}
    return make_knobs(policy, lower | dict(changes or {}), "schedule")


def terms_text() -> str:
    """The equal terms, for titles."""
    return "equal terms for all: tiles {tile_m} x {tile_n}, {rate:.0%} of the tensor peak".format_map(SAME)


def heading(text: str) -> None:
    """A table's title. It says what numbers these are, because nobody has measured them."""
    print(f"\nsimulated, {PRECISION}: {text}", flush=True)
