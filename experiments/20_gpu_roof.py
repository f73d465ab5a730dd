"""Question: how far is the layer on one GPU from what the GPU can do at all, for layers of open models?

Command:  python experiments/20_gpu_roof.py --json experiments/results/roof.jsonl
          [--shapes scout,olmoe,qwen3,paper] [--tokens 128,...,16384] [--repeats 20] [--dtype float16]
          [--virtual-ranks 1] [--tf32]
Expected: few tokens: time is that of reading the experts' weights (scout: 1.2 ms on an H100; goal: at most 1.3 ms from
          128 to 2048 tokens). Many: at least 0.6 of cuBLAS on as many operations, goal 0.8. Every row ok: a sample of
          the results is within the tolerance of the float64 oracle. Some minutes, most of them for the weights.

`roof_ms` is the larger of two times: operations of real rows / the rate of a large cuBLAS GEMM, and bytes / the
bandwidth of a large copy, both measured in this run. Bytes are the weights of the experts that have a row, tokens and
results. `share` is roof_ms / ms. Beside the layer, by turns with it:

    launch_per_op   gather rows; for each expert cuBLAS GEMMs and an activation; combine. The routing is given, and on
                    the host, which is in its favour: the layer computes its own
    grouped         the same with PyTorch's grouped GEMM, where PyTorch has one for the dtype
    one_gemm        one cuBLAS GEMM of as many operations: [rows, hidden] by [hidden, 2 or 3 times ffn]

Times are on the GPU (gpu_common.py): medians, and `host_ms` is what the host needs to enqueue the layer's call.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from common import Row, show, store
from gpu_common import (
    Clock,
    check_sample,
    facts,
    gpu_layer,
    gpu_parser,
    integers,
    leave_without_gpu,
    random_x,
    shares,
    study_configs,
    to_gpu,
)

from reference import MoEConfig, Weights, element_dtype

TOKENS = "128,256,512,1024,2048,4096,8192,16384"
SQUARE, COPY_BYTES = 8192, 1 << 31
COLUMNS = {
    "shape": "",
    "tokens": "d",
    "ms": ".3f",
    "host_ms": ".2f",
    "roof_ms": ".3f",
    "bound": "",
    "share": ".2f",
    "tflops": ".0f",
    "of_cublas": ".2f",
    "launch_per_op_ms": ".3f",
    "grouped_ms": ".3f",
    "one_gemm_ms": ".3f",
    "error": ".1e",
    "ok": "",
}


def main() -> int:
    parser = gpu_parser(__doc__)
    parser.add_argument("--tokens", default=TOKENS, help=f"of all ranks together [{TOKENS}]")
    parser.add_argument("--virtual-ranks", type=int, default=1, help="that share the GPU [1]")
    args = parser.parse_args()
    leave_without_gpu(args)
    tokens = [16, 100] if args.smoke else integers(args.tokens)
    args.repeats = 2 if args.smoke else args.repeats
    clock, rows = Clock(), []
    limits = measure_limits(clock, args.dtype, 1024 if args.smoke else SQUARE, args.repeats)
    print(f"measured: cuBLAS {limits['tflops']:.0f} TFLOP/s, copy {limits['gb_per_s']:.0f} GB/s", flush=True)
    for name, config in study_configs(args, max(tokens), args.virtual_ranks).items():
        found = study(name, config, tokens, clock, limits, args)
        show(found, COLUMNS)
        store(found, args.json)
        rows += found
    return 0 if all(row["ok"] for row in rows) else 1


def measure_limits(clock: Clock, dtype: str, side: int, repeats: int) -> dict[str, float]:
    """Rates of a large GEMM and of a large copy."""
    import cupy

    a, b = (to_gpu(np.full((side, side), value, np.float32).astype(element_dtype(dtype))) for value in (0.5, 0.25))
    source = cupy.zeros(COPY_BYTES, np.uint8)
    target = cupy.empty_like(source)
    variants = {"gemm": lambda: matmul(a, b), "copy": lambda: cupy.copyto(target, source)}
    times = clock.measure(variants, repeats)
    return {
        "tflops": 2 * side**3 / times["gemm"]["ms"] / 1e9,
        "gb_per_s": 2 * COPY_BYTES / times["copy"]["ms"] / 1e6,
    }


def matmul(a: Any, b: Any, out: Any = None) -> Any:
    """By cuBLAS; sums of 16-bit floats are float32 there, too."""
    import cupy

    return cupy.matmul(a, b, out=out)


def study(
    name: str, config: MoEConfig, token_counts: list[int], clock: Clock, limits: dict[str, float], args: Any
) -> list[Row]:
    """One row per number of tokens."""
    weights, x = Weights.random(config), random_x(config)
    on_gpu, rows = to_gpu(x), []
    baselines = Baselines(config, weights)
    with gpu_layer(config, weights, args) as layer:
        for tokens in token_counts:
            parts = shares(on_gpu, config.num_ranks, tokens)
            y = layer(parts)
            layer.synchronize()
            error, limit = check_sample(config, weights, x[:tokens], y, layer, args)
            routing = [np.concatenate([getattr(r, n) for r in layer.routing]) for n in ("topk_idx", "topk_weights")]
            padded = sum(stats.padded_rows for stats in layer.stats)
            variants = {"layer": lambda parts=parts: layer(parts), **baselines.variants(on_gpu[:tokens], *routing)}
            times = clock.measure(variants, args.repeats)
            layer.synchronize()
            row = summary(config, tokens, routing[0], times, limits)
            ends = {"error": error, "tolerance": limit, "ok": bool(error <= limit)}
            about = {"shape": name, "virtual_ranks": config.num_ranks, "variant": layer._backend.variant.name}
            about |= {"padded_rows": padded, "left_out": baselines.left_out, "times": times, "limits": limits}
            rows.append(about | row | ends | facts(args))
    return rows


def summary(
    config: MoEConfig, tokens: int, topk_idx: np.ndarray, times: dict[str, dict[str, float]], limits: dict[str, float]
) -> Row:
    matrices, pairs, item = config.expert_kind.num_matrices, topk_idx.size, config.format.num_bytes
    flops = 2 * pairs * matrices * config.hidden * config.ffn
    num_bytes = np.unique(topk_idx).size * matrices * config.hidden * config.ffn * item
    num_bytes += 2 * tokens * config.hidden * item
    compute_ms, memory_ms = flops / limits["tflops"] / 1e9, num_bytes / limits["gb_per_s"] / 1e6
    ms = times["layer"]["ms"]
    return {
        "tokens": tokens,
        "ms": ms,
        "host_ms": times["layer"]["host_ms"],
        "roof_ms": max(compute_ms, memory_ms),
        "bound": "memory" if memory_ms > compute_ms else "compute",
        "share": max(compute_ms, memory_ms) / ms,
        "tflops": flops / ms / 1e9,
        "of_cublas": times["one_gemm"]["ms"] / ms if "one_gemm" in times else float("nan"),
        **{f"{n}_ms": times[n]["ms"] if n in times else float("nan") for n in ("launch_per_op", "grouped", "one_gemm")},
    }


ACTIVATIONS = {
    "identity": "v",
    "relu": "v > 0.f ? v : 0.f",
    "gelu": "0.5f * v * (1.f + erff(v * 0.70710678f))",
    "silu": "v / (1.f + expf(-v))",
}


class Baselines:
    """The same experts by library calls. What a library cannot do is left out, and why is kept in `left_out`."""

    def __init__(self, config: MoEConfig, weights: Weights) -> None:
        import cupy

        self.config, self.left_out = config, {}
        self._cupy, self._up = cupy, to_gpu(_stacked(config, weights))  # [E, (1 or 2) F, H]
        self._down = to_gpu(weights.down_proj)
        formula = ACTIVATIONS[config.activation]
        gated = "T gate, T up", f"float v = float(gate); h = T(({formula}) * float(up))"
        plain = "T gate", f"float v = float(gate); h = T({formula})"
        takes, code = gated if config.gated else plain
        self._activate = cupy.ElementwiseKernel(takes, "T h", code, f"activate_{config.activation}_{config.gated}")
        self._combine = cupy.ElementwiseKernel(
            "raw T rows, raw int32 place, raw float32 factor, int32 topk, int32 hidden",
            "T y",
            """int t = i / hidden, c = i % hidden;
            float sum = 0;
            for (int j = t * topk; j < (t + 1) * topk; ++j)
                sum += factor[j] * float(rows[(long long)place[j] * hidden + c]);
            y = T(sum);""",
            "combine_rows",
        )

    def variants(self, x: Any, topk_idx: np.ndarray, topk_weights: np.ndarray) -> dict[str, Callable[[], object]]:
        """Those that run here, ready for these tokens and this routing."""
        experts = topk_idx.reshape(-1)
        order = np.argsort(experts, kind="stable")
        place = np.empty(order.size, np.int32)
        place[order] = np.arange(order.size)
        ends = np.cumsum(np.bincount(experts, minlength=self.config.num_experts)).tolist()
        cupy = self._cupy
        tokens = cupy.asarray((order // self.config.num_topk).astype(np.int64))
        back = cupy.asarray(place), cupy.asarray(topk_weights.reshape(-1).astype(np.float32))
        wide = cupy.empty((self._up.shape[1] + self.config.ffn, self.config.hidden), x.dtype)
        wide.view(np.uint8)[...] = 0
        rows = x[tokens]
        made = {
            "launch_per_op": lambda: self._launch_per_op(x, tokens, ends, *back),
            "grouped": self._grouped(x, tokens, ends, back),
            "one_gemm": lambda: matmul(rows, wide.T),
        }
        return {name: run for name, run in made.items() if run is not None and self._runs(name, run)}

    def _runs(self, name: str, run: Callable[[], object]) -> bool:
        try:
            run()
            self._cupy.cuda.runtime.deviceSynchronize()
            return True
        except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            self.left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            return False

    def _launch_per_op(self, x: Any, tokens: Any, ends: list[int], place: Any, factor: Any) -> Any:
        rows, first = x[tokens], 0
        results = self._cupy.empty((len(rows), self.config.hidden), x.dtype)
        for expert, end in enumerate(ends):
            if end > first:
                hidden = self._halves(matmul(rows[first:end], self._up[expert].T))
                matmul(hidden, self._down[expert].T, out=results[first:end])
            first = end
        return self._combined(results, x, place, factor)

    def _halves(self, up: Any) -> Any:
        ffn = self.config.ffn
        return self._activate(up[:, :ffn], up[:, ffn:]) if self.config.gated else self._activate(up)

    def _combined(self, results: Any, x: Any, place: Any, factor: Any) -> Any:
        y = self._cupy.empty_like(x)
        return self._combine(results, place, factor, self.config.num_topk, self.config.hidden, y)

    def _grouped(self, x: Any, tokens: Any, ends: list[int], back: tuple[Any, Any]) -> Callable[[], object] | None:
        """With PyTorch's grouped GEMM: rows of all experts in one launch."""
        if importlib.util.find_spec("torch") is None:
            self.left_out["grouped"] = "PyTorch is not installed"
            return None
        import torch

        grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
        if grouped_mm is None or self.config.dtype != "bfloat16":
            self.left_out["grouped"] = f"PyTorch {torch.__version__} has none for {self.config.dtype}"
            return None
        up, down, tensor = (as_torch(array) for array in (self._up, self._down, x))
        index = torch.from_dlpack(tokens)
        offsets = torch.tensor(ends, dtype=torch.int32, device="cuda")
        place, factor = (torch.from_dlpack(array) for array in back)
        ffn, topk = self.config.ffn, self.config.num_topk
        act = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu, "relu": torch.relu}.get(
            self.config.activation, lambda value: value
        )

        def run() -> Any:
            hidden = grouped_mm(tensor[index], up.transpose(-2, -1), offs=offsets)
            hidden = act(hidden[:, :ffn]) * hidden[:, ffn:] if self.config.gated else act(hidden)
            results = grouped_mm(hidden, down.transpose(-2, -1), offs=offsets)
            pairs = results[place.long()].view(-1, topk, self.config.hidden) * factor.view(-1, topk, 1)
            return pairs.sum(dim=1).to(tensor.dtype)

        return run


def as_torch(array: Any) -> Any:
    """The same memory as a PyTorch tensor, bfloat16 too."""
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_dlpack(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_dlpack(array)


def _stacked(config: MoEConfig, weights: Weights) -> np.ndarray:
    """Gate and up of each expert one after the other, so that one GEMM makes both."""
    if not config.gated:
        return weights.up_proj
    return np.concatenate([weights.gate_proj, weights.up_proj], axis=1)


if __name__ == "__main__":
    sys.exit(main())
