"""Question: how long does one layer of Qwen3-30B-A3B take from its checkpoint's files to a token, in what memory?

Command:  python experiments/42_checkpoint.py
Expected: resident memory stays within 1.15 of the packed weights. A minute on two cores; 2.5 GiB of memory and 1.2 GiB
          in the scratch folder.

The files are made here: random bfloat16 weights of that layer's true shape under their published names, over several
files. Then a process of its own, with its kernel compiled, loads them (`load_s`), makes a layer (`pack_s`), lets go
of what was loaded and calls the layer with one token, routed anew in each call (`call_ms`: the median). `rss_ratio`
is what the process grew by from before loading until after the calls, and `peak_ratio` what it grew by at most, over
the weights' bytes.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from common import Row, machine, parser_of, program, show, store
from safetensors.numpy import save_file

from flashmoe_numba import FlashMoE
from flashmoe_numba.checkpoints import Checkpoint
from reference import MoEConfig, Weights, element_dtype

FULL = dict(hidden_size=2048, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8)
SMOKE = dict(hidden_size=64, moe_intermediate_size=48, num_experts=16, num_experts_per_tok=8)
COLUMNS = {"weights_mib": ".0f", "load_s": ".2f", "pack_s": ".2f", "call_ms": ".2f", "rss_ratio": ".3f"}
COLUMNS |= {"peak_ratio": ".3f"}
BFLOAT16 = element_dtype("bfloat16")
TINY = MoEConfig(
    num_ranks=1,
    num_tokens=1,
    hidden=8,
    ffn=8,
    num_experts=2,
    num_topk=1,
    gated=True,
    activation="silu",
    dtype="bfloat16",
)


def main() -> int:
    parser = parser_of(__doc__)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), SMOKE if args.smoke else FULL, num_files=4)
        with get_context("spawn").Pool(1) as pool:  # whose memory holds nothing of the making
            row = pool.apply(measure, (folder, 3 if args.smoke else 51))
    show([row], COLUMNS)
    store([row | machine() | program(("numpy", "numba"))], args.json)
    return 0


def write_checkpoint(folder: Path, sizes: dict[str, int], num_files: int) -> None:
    """A model of one layer under its published names, whose experts are dealt out over the files."""
    config = dict(model_type="qwen3_moe", num_hidden_layers=1, hidden_act="silu", norm_topk_prob=True, **sizes)
    (folder / "config.json").write_text(json.dumps(config))
    hidden, ffn, experts = sizes["hidden_size"], sizes["moe_intermediate_size"], sizes["num_experts"]
    rng, block, weight_map = np.random.default_rng(0), "model.layers.0.mlp", {}
    for i in range(num_files):
        shapes = {f"{block}.gate.weight": (experts, hidden)} if i == 0 else {}
        for expert in range(i, experts, num_files):
            for name, shape in (("gate", (ffn, hidden)), ("up", (ffn, hidden)), ("down", (hidden, ffn))):
                shapes[f"{block}.experts.{expert}.{name}_proj.weight"] = shape
        file = f"model-{i + 1:05}-of-{num_files:05}.safetensors"
        save_file({name: _random(rng, shape) for name, shape in shapes.items()}, folder / file)
        weight_map |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _random(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    return (rng.standard_normal(shape, np.float32) * shape[-1] ** -0.5).astype(BFLOAT16)


def measure(folder: str, calls: int) -> Row:
    """In a process of its own, which has its kernel and libraries already: from files to tokens."""
    with FlashMoE(TINY, Weights.random(TINY)) as layer:
        layer([np.zeros((1, TINY.hidden), BFLOAT16)])
    before, began = _resident("VmRSS"), time.perf_counter()
    with Checkpoint(folder) as checkpoint:
        config, weights = checkpoint.load(0, num_tokens=1)
        assert checkpoint.bytes_read == weights.num_bytes
    num_bytes, loaded = weights.num_bytes, time.perf_counter()
    with FlashMoE(config, weights) as layer:
        packed = time.perf_counter()
        del weights
        times = list(_times(layer, calls))
        ctypes.CDLL(None).malloc_trim(0)  # what is free goes back, and is not counted
        grew = {name: (_resident(name) - before) / num_bytes for name in ("VmRSS", "VmHWM")}
    row: Row = dict(weights_mib=num_bytes / 2**20, load_s=loaded - began, pack_s=packed - loaded)
    return row | dict(call_ms=statistics.median(times), rss_ratio=grew["VmRSS"], peak_ratio=grew["VmHWM"], calls=calls)


def _times(layer: FlashMoE, calls: int) -> Any:
    rng = np.random.default_rng(1)
    for _ in range(calls):
        x = rng.standard_normal((1, layer.config.hidden), np.float32).astype(BFLOAT16)
        began = time.perf_counter()
        layer([x])
        yield (time.perf_counter() - began) * 1e3


def _resident(name: str) -> int:
    """Bytes of this process's memory: VmRSS now, VmHWM at most."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


if __name__ == "__main__":
    sys.exit(main())
