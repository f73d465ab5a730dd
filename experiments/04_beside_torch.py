"""Question: how fast is the layer beside PyTorch's MoE blocks and beside the memory, from one token to many?

Command:  python experiments/04_beside_torch.py --json experiments/results/FILE.jsonl
          [--layers gemm,gemm-bf16,qwen3,olmoe] [--tokens 1,4,16,64,256,2048] [--repeats 15]
          python experiments/04_beside_torch.py --ranks 8 --json FILE     the layer on 8 ranks beside 1, without PyTorch
Expected: `ratio` at most 1 in float32, for every number of tokens; `share` at least 0.8 up to 16 tokens. On 8 ranks
          `ratio` at most 1.5, and hardly more padding than on one. Every row ok. Some 10 minutes on two cores, most of
          them for large batches and for making weights; 10 GB of memory for qwen3.

One rank, a thread for each core; the same for PyTorch. Its blocks, `eager` and `grouped`, are those of torch_block.py,
with their own router. All variants take turns in one process, and each call has other tokens, so that it wants other
experts. Each variant gets the same batches, at other times: none finds in the cache what another has just read.
Of the same kind, `probe` is reading as many bytes as the weights of the experts that a batch has chosen, by as many
threads, out of a buffer as large as all weights (at most 1 GiB).

Times are medians (first to third quartile), `ratio` is the layer's over the better of PyTorch's, `by_min` the same of
the fastest calls. `share` is the layer's rate of reading those weights over that of the probe, `torch_share` that of
the faster block. `error` is how far the results are apart, of the largest; both come from the same routing for that,
and each one's own routing is checked against exact logits.

Measure on a machine with nothing else to do (`load` is stored, the processes that wanted to run in the last minute).
PyTorch's threads wait for one another by spinning: beside other programs it takes many times as long, the layer less.

With --ranks: see beside_one_rank.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from beside_one_rank import RANK_COLUMNS, beside_one_rank
from common import Row, cpu_has, leave, machine, parser_of, program, show, store
from memory_probe import MemoryProbe

from flashmoe_numba import FlashMoE
from flashmoe_numba.commands.flags import integer, integers
from flashmoe_numba.processes.cores import default_processors
from reference import MoEConfig, Weights, check_routing, load_preset, make_workload, max_rel_error

LAYERS = {
    "gemm": ("laptop-gemm", "float32"),
    "gemm-bf16": ("laptop-gemm", "bfloat16"),
    "qwen3": ("qwen3-30b-a3b", "float32"),
    "olmoe": ("olmoe-1b-7b", "float32"),
}
TILES = ("tile_m", "tile_m_min", "tile_n", "token_block")  # laptop-gemm's, for all: those of other presets suit GPUs
TOKENS = (1, 4, 16, 64, 256, 2048)
TORCH = ("eager", "grouped")
SETTLE_S = 0.02  # PyTorch's workers spin for 5 ms after their work, on cores that the next variant needs
MOST_PROBE_BYTES = 1 << 30
PACKAGES = ("numpy", "numba", "torch")
EXTENSIONS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16")
COLUMNS = {
    "layer": "",
    "tokens": "d",
    "experts": ".0f",
    "ours_ms": "",
    "eager_ms": "",
    "grouped_ms": "",
    "ratio": ".2f",
    "by_min": ".2f",
    "probe_gb_per_s": ".1f",
    "share": ".2f",
    "torch_share": ".2f",
    "error": ".1e",
    "ok": "",
}


def main() -> int:
    parser = _parser()
    args = parser.parse_args()
    if args.ranks and (args.layers or args.tokens):
        parser.error("--ranks has its own layer and tokens: leave --layers and --tokens out")
    if args.repeats < len(TORCH) + 2:
        parser.error(f"--repeats must be at least {len(TORCH) + 2}, a batch for each variant, got {args.repeats}")
    args.layers, args.tokens = args.layers or list(LAYERS), args.tokens or TOKENS
    args.load = os.getloadavg()[0]
    rows = []
    if args.ranks or args.smoke:
        rows += report(beside_one_rank(args.ranks or 2, args.repeats, args.smoke), RANK_COLUMNS, args)
    if not args.ranks:
        reason = missing()
        if reason is not None:
            leave(reason, args)
        for name in args.layers[:2] if args.smoke else args.layers:  # small, all are alike but for the dtype
            rows += report(beside_torch(name, args), COLUMNS, args)
    return 0 if all(row["ok"] for row in rows) else 1


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--layers", type=_layers, metavar="NAMES", help=f"out of {','.join(LAYERS)} [all]")
    listed = ",".join(map(str, TOKENS))
    add("--tokens", type=integers(1), metavar="N[,N]", help=f"of a call, on one rank [{listed}]")
    add("--repeats", type=integer(1), default=15, metavar="N", help="calls of each variant, or of each run [15]")
    add("--ranks", type=integer(2), metavar="N", help="instead of PyTorch: N ranks beside one")
    return parser


def _layers(text: str) -> list[str]:
    """An argparse type."""
    unknown = [name for name in text.split(",") if name not in LAYERS]
    if unknown:
        raise argparse.ArgumentTypeError(f"must be out of {', '.join(LAYERS)}; got {', '.join(unknown)}")
    return text.split(",")


def report(rows: list[Row], columns: dict[str, str], args: argparse.Namespace) -> list[Row]:
    """Show and store them, with what they were measured on."""
    show([{key: _shown(value) for key, value in row.items()} for row in rows], columns)
    terms = machine() | {"cpu_has": cpu_has(EXTENSIONS), "load": args.load} | program(PACKAGES)
    store([row | terms for row in rows], args.json)
    return rows


def _shown(value: Any) -> Any:
    """Times as text."""
    if not isinstance(value, dict):
        return value
    return f"{value['median']:.2f} ({value['quartiles'][0]:.2f}-{value['quartiles'][1]:.2f})"


# beside PyTorch


def missing() -> str | None:
    """Why nothing can be measured beside PyTorch here."""
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed: pip install 'flashmoe-numba[torch]'"
    import torch

    if not hasattr(torch.nn.functional, "grouped_mm"):
        return f"PyTorch {torch.__version__} has no grouped_mm: pip install 'flashmoe-numba[torch]'"
    return None


def beside_torch(name: str, args: argparse.Namespace) -> list[Row]:
    """One row per number of tokens of one of LAYERS."""
    import torch

    with torch.inference_mode():
        return _beside_torch(name, args)


def _beside_torch(name: str, args: argparse.Namespace) -> list[Row]:
    tokens, repeats = ([1, 5], 2) if args.smoke else (args.tokens, args.repeats)
    config = layer_config(name, max(tokens), args.smoke)
    with Variants(config, default_processors(1)) as variants:
        points = [Point(config, variants, num_tokens, repeats) for num_tokens in tokens]
        for point in sorted(points, key=lambda point: -point.tokens):  # who has most rows touches memory for all
            point.warm_up()
        for repeat in range(repeats):
            for point in points:
                point.measure(repeat)
    return [{"layer": name, "dtype": config.dtype, **point.row()} for point in points]


def layer_config(name: str, num_tokens: int, smoke: bool) -> MoEConfig:
    preset, dtype = LAYERS[name]
    own = dict(num_ranks=1, num_tokens=num_tokens, dtype=dtype)
    if smoke:
        return load_preset("laptop-tiny", **own)
    tiles = load_preset("laptop-gemm")
    return load_preset(preset, **own, **{tile: getattr(tiles, tile) for tile in TILES})


class Variants:
    """One layer, as this package has it and as PyTorch has it, and the memory.

    `calls` take tokens as they come from `tokens_for`, and give results as `array_of` understands them.
    """

    def __init__(self, config: MoEConfig, threads: int) -> None:
        import torch
        from torch_block import TorchBlock

        torch.set_num_threads(threads)
        weights = Weights.random(config)
        self.threads, self.router = threads, weights.router
        self.expert_bytes = sum(matrices[0].nbytes for matrices in (*(up for up, _ in weights.ups), weights.down_proj))
        self.probe = MemoryProbe(min(MOST_PROBE_BYTES, self.expert_bytes * config.num_experts), threads)
        self.layer = FlashMoE(config, weights, num_processors=threads)
        self.block = TorchBlock(config, weights)

    def __enter__(self) -> Variants:
        return self

    def __exit__(self, *exception: object) -> None:
        self.layer.__exit__(*exception)


class Point:
    """Calls with one number of tokens."""

    def __init__(self, config: MoEConfig, variants: Variants, tokens: int, repeats: int) -> None:
        from torch_block import as_tensor

        self._config, self._variants, self.tokens = config, variants, tokens
        self._x = [make_workload("uniform", config, tokens, seed).x[0] for seed in range(repeats)]
        self._tensors = [as_tensor(x) for x in self._x]
        block = variants.block
        chosen = [np.unique(block.route(x)[0].numpy()).size for x in self._tensors]
        self._bytes = np.array(chosen) * variants.expert_bytes
        self._calls: dict[str, Callable[[int], object]] = {
            "ours": lambda batch: variants.layer([self._x[batch]]),
            "eager": lambda batch: block.eager(self._tensors[batch], *block.route(self._tensors[batch])),
            "grouped": lambda batch: block.grouped(self._tensors[batch], *block.route(self._tensors[batch])),
            "probe": lambda batch: variants.probe.read(int(self._bytes[batch])),
        }
        self._ns = {name: np.zeros(repeats) for name in self._calls}

    def warm_up(self) -> None:
        """One call of each, and what they have in common."""
        for call in self._calls.values():
            call(0)
        self._compare()

    def _compare(self) -> None:
        """Results of the layer and of both blocks by the layer's routing, and both routings by exact logits."""
        import torch
        from torch_block import agreement, as_array, as_routing

        x, tensor, variants = self._x[0], self._tensors[0], self._variants
        y, routing = variants.layer([x])[0], variants.layer.routing[0]
        given = torch.from_numpy(routing.topk_idx).long(), torch.from_numpy(routing.topk_weights)
        blocks = [getattr(variants.block, name)(tensor, *given) for name in TORCH]
        self._error = max(max_rel_error(as_array(result), y) for result in blocks)
        self._limit = agreement(self._config)
        routings = [routing, as_routing(*variants.block.route(tensor))]
        found = [check_routing(routing, x, variants.router, self._config) for routing in routings]
        self._failures = [sentence for sentence in found if sentence is not None]
        if not self._error <= self._limit:
            self._failures.append(f"results must be within {self._limit:.1e} of each other, got {self._error:.1e}")

    def measure(self, repeat: int) -> None:
        """One call of each; in all repeats each has each batch once."""
        for place, (name, call) in enumerate(self._calls.items()):
            batch = (repeat + place) % len(self._x)
            time.sleep(SETTLE_S)
            start = time.perf_counter_ns()
            call(batch)
            self._ns[name][batch] = time.perf_counter_ns() - start

    def row(self) -> Row:
        rates = {name: float(np.median(self._bytes / ns)) for name, ns in self._ns.items()}
        for sentence in self._failures:
            print(f"{self.tokens} tokens: {sentence}", flush=True)
        return {
            "tokens": self.tokens,
            "threads": self._variants.threads,
            "repeats": len(self._x),
            "experts": float(np.median(self._bytes)) / self._variants.expert_bytes,
            "read_bytes": float(np.median(self._bytes)),
            **{f"{name}_ms": spread(ns / 1e6) for name, ns in self._ns.items()},
            "ratio": ratio(self._ns, np.median),
            "by_min": ratio(self._ns, np.min),
            "probe_gb_per_s": rates["probe"],
            "share": rates["ours"] / rates["probe"],
            "torch_share": max(rates[name] for name in TORCH) / rates["probe"],
            "error": self._error,
            "tolerance": self._limit,
            "failures": self._failures,
            "ok": not self._failures,
        }


def spread(times: np.ndarray) -> dict[str, Any]:
    first, middle, third = np.quantile(times, (0.25, 0.5, 0.75)).tolist()
    return {"median": middle, "min": float(times.min()), "quartiles": [first, third]}


def ratio(ns: dict[str, np.ndarray], of: Callable[[np.ndarray], Any]) -> float:
    """The layer's time over that of the better of PyTorch's blocks."""
    return float(of(ns["ours"]) / min(of(ns[name]) for name in TORCH))


if __name__ == "__main__":
    sys.exit(main())
