"""What the experiments on a GPU share: whether there is one, how time is measured on it, and facts to store with a row.

Time on a GPU is that between two events in one stream. Launching takes the host time, too, which would be counted as
the GPU's where it waits for work; so a *cover* keeps the GPU busy (it writes a buffer larger than the second-level
cache again and again) while the host enqueues what is measured. That also empties the cache, as other layers would.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from common import Row, leave, machine, parser_of, program

from flashmoe_numba import FlashMoE
from flashmoe_numba.gpu.driver import ask_driver
from reference import MoEConfig, Weights, expert_ffn, load_preset, tolerance

COVER_BYTES = 1 << 29
WARM_UP = 3
PACKAGES = ("numpy", "numba", "numba-cuda", "cupy-cuda13x", "nvidia-cublas", "torch")
SHAPES = {
    "scout": "llama-4-scout",
    "olmoe": "olmoe-1b-7b",
    "qwen3": "qwen3-30b-a3b",
    "paper": "flashmoe-paper",
}
SMOKE = dict(hidden=256, ffn=384, num_experts=8, num_topk=2)


def gpu_parser(description: str | None) -> argparse.ArgumentParser:
    """The flags that all of them have."""
    parser = parser_of(description)
    add = parser.add_argument
    add("--shapes", default=",".join(SHAPES), help=f"names out of {', '.join(SHAPES)}, with commas between [all]")
    add("--repeats", type=int, default=20, help="measured calls of each variant [20]")
    add("--dtype", choices=("float16", "bfloat16", "float32"), default="float16", help="[float16]")
    add("--tf32", action="store_true", help="multiply float32 as TF32")
    return parser


def leave_without_gpu(args: argparse.Namespace) -> None:
    """End here if there is no GPU: as a smoke run with success, because there is nothing wrong; else with an error."""
    reason = missing()
    if reason is None:
        os.environ["CUPY_TF32"] = str(int(args.tf32))  # cuBLAS does as the layer does
        return
    leave(reason, args)


def missing() -> str | None:
    """Why no experiment on a GPU can run here."""
    for module, package in (("cupy", "CuPy"), ("numba_cuda", "numba-cuda")):
        if importlib.util.find_spec(module) is None:
            return f"{package} is not installed: pip install 'flashmoe-numba[cuda]'"
    driver = ask_driver()
    return None if driver.devices else f"no GPU: {driver.error or 'the driver knows of none'}; see `flashmoe doctor`"


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def study_configs(args: argparse.Namespace, num_tokens: int, num_ranks: int = 1) -> dict[str, MoEConfig]:
    """The chosen shapes, dropless, all tokens on virtual ranks of one GPU."""
    own = dict(num_ranks=num_ranks, num_tokens=-(-num_tokens // num_ranks), dtype=args.dtype)
    if args.smoke:
        return {"smoke": MoEConfig(**SMOKE, **own, gated=True, activation="silu")}
    unknown = [name for name in args.shapes.split(",") if name not in SHAPES]
    if unknown:
        sys.exit(f"--shapes must be out of {', '.join(SHAPES)}; got {', '.join(unknown)}")
    return {name: load_preset(SHAPES[name], capacity=None, shared_ffn=0, **own) for name in args.shapes.split(",")}


def facts(args: argparse.Namespace) -> Row:
    """Where and when a row was measured, and with what."""
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    found = program(PACKAGES)
    found["versions"]["cuda driver"], found["versions"]["cuda runtime"] = (
        str(function()) for function in (cupy.cuda.runtime.driverGetVersion, cupy.cuda.runtime.runtimeGetVersion)
    )
    return {
        "gpu": properties["name"].decode(),
        **machine(),
        **found,
        "dtype": args.dtype,
        "repeats": args.repeats,
    }


# time


class Clock:
    """Measures variants by turns on the current stream."""

    def __init__(self) -> None:
        import cupy

        self._cupy, self._buffer = cupy, cupy.empty(COVER_BYTES, np.uint8)
        self._cover_once()  # the first write of a buffer takes longer
        self._cover_ms = self._between(self._cover_once)

    def _cover_once(self) -> None:
        runtime, stream = self._cupy.cuda.runtime, self._cupy.cuda.get_current_stream()
        runtime.memsetAsync(self._buffer.data.ptr, 0, COVER_BYTES, stream.ptr)

    def _between(self, run: Callable[[], object]) -> float:
        """Milliseconds on the GPU."""
        start, end = self._cupy.cuda.Event(), self._cupy.cuda.Event()
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(self._cupy.cuda.get_elapsed_time(start, end))

    def measure(self, variants: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
        """Median, least and most milliseconds of each variant on the GPU, and of the host to enqueue it.

        `hidden` is the part of the repeats in which the cover lasted longer than the host took.
        """
        covers = {name: self._warm_up(run) for name, run in variants.items()}
        gpu_ms: dict[str, list[float]] = {name: [] for name in variants}
        host_ms: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(repeats):
            for name, run in variants.items():
                self._cupy.cuda.runtime.deviceSynchronize()
                for _ in range(covers[name]):
                    self._cover_once()
                begin = time.perf_counter()
                gpu_ms[name].append(self._between(self._timed(run, begin, host_ms[name])))
        return {
            name: {
                "ms": float(np.median(gpu_ms[name])),
                "least_ms": min(gpu_ms[name]),
                "most_ms": max(gpu_ms[name]),
                "host_ms": float(np.median(host_ms[name])),
                "hidden": float(np.mean(np.array(host_ms[name]) < 0.9 * covers[name] * self._cover_ms)),
            }
            for name in variants
        }

    @staticmethod
    def _timed(run: Callable[[], object], begin: float, host_ms: list[float]) -> Callable[[], object]:
        def timed() -> object:
            result = run()
            host_ms.append(1e3 * (time.perf_counter() - begin))
            return result  # alive until the end of this call, which is enqueued by then

        return timed

    def _warm_up(self, run: Callable[[], object]) -> int:
        """Covers that this variant needs, after calls that are not measured."""
        host_ms = []
        for _ in range(WARM_UP):
            self._cupy.cuda.runtime.deviceSynchronize()
            begin = time.perf_counter()
            run()
            host_ms.append(1e3 * (time.perf_counter() - begin))
        return math.ceil(2 * min(host_ms) / self._cover_ms) + 1


def to_gpu(array: np.ndarray) -> Any:
    """As a CuPy array, which may have the bfloat16 of ml_dtypes."""
    import cupy

    if array.dtype.name == "bfloat16":
        return cupy.asarray(array.view(np.int16)).view(array.dtype)
    return cupy.asarray(array)


# the layer


def random_x(config: MoEConfig, seed: int = 1) -> np.ndarray:
    """`[num_ranks * num_tokens, hidden]`"""
    rng = np.random.default_rng(seed)
    shape = (config.num_ranks * config.num_tokens, config.hidden)
    return rng.standard_normal(shape, dtype=np.float32).astype(config.numpy_dtype)


def gpu_layer(config: MoEConfig, weights: Weights, args: argparse.Namespace, **how: Any) -> FlashMoE:
    return FlashMoE(config, weights, backend="cuda", tf32=args.tf32, **how)


def shares(x: Any, num_ranks: int, tokens: int) -> list[Any]:
    """The first `tokens` of all, shared out evenly; the last ranks may get fewer."""
    each = -(-tokens // num_ranks)
    return [x[min(rank * each, tokens) : min((rank + 1) * each, tokens)] for rank in range(num_ranks)]


def check_sample(
    config: MoEConfig, weights: Weights, x: np.ndarray, y: Sequence[Any], layer: FlashMoE, args: argparse.Namespace
) -> tuple[float, float]:
    """(largest error, what it may be) of some tokens' rows against float64, in units of the largest result.

    The layer's own routing is used; that it is one is for the tests.
    """
    import cupy

    whole = cupy.concatenate([part.view(np.int16) if part.itemsize == 2 else part for part in y])
    idx, factors = (np.concatenate([getattr(r, name) for r in layer.routing]) for name in ("topk_idx", "topk_weights"))
    sample = np.unique(np.linspace(0, len(whole) - 1, 8).astype(int))
    got = cupy.asnumpy(whole[cupy.asarray(sample)]).view(config.numpy_dtype).astype(np.float64)
    exact = np.zeros(got.shape)
    for expert in np.unique(idx[sample]).tolist():
        rows, choices = np.nonzero(idx[sample] == expert)
        results = expert_ffn(x[sample[rows]], weights, expert, config)
        exact[rows] += factors[sample][rows, choices].astype(np.float64)[:, None] * results
    limit = tolerance(config)
    if config.dtype == "float32" and args.tf32:
        limit *= 2.0**13  # 10 bits of mantissa in place of 23
    return float(np.abs(got - exact).max() / np.abs(exact).max()), limit
