"""Question: how long do a forward and its backward take, beside the forward alone and beside PyTorch's autograd?

Command:  python experiments/05_training_beside_torch.py --json experiments/results/FILE.jsonl
          [--tokens 256,2048] [--save rows+up,rows,nothing] [--repeats 9]
Expected: `times_forward` at most 3.3 and `ratio` at most 1 in float32 with save "rows+up". Every row ok. Some three
          minutes on two cores and 4 GB of memory.

One rank, a thread for each core; the same for PyTorch, whose blocks are those of torch_block.py under autograd. All
variants take turns in one process, with other tokens in each turn. A step is a forward and a backward that gives the
gradients of tokens, router and experts anew: no sums go on. Nobody has those of the turn before any more, and it is for
both to make of that memory what they can. `ratio` is the layer's
step over the better of PyTorch's, `times_forward` over the layer's forward that keeps nothing, and `sums_go_on` the
same of a step that goes on with the sums for weights, as micro-batches do; medians (first to third quartile).
`kept_mb` is what waits for the backward, as the layer tells it. `error` is the largest difference of any
gradient to that of `eager` by the layer's routing, of that gradient's largest number.

Measure on a machine with nothing else to do: PyTorch's threads wait for one another by spinning.
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
from common import Row, leave, machine, parser_of, program, show, store

from flashmoe_numba import FlashMoE
from flashmoe_numba.commands.flags import integer, integers
from flashmoe_numba.processes.cores import default_processors
from reference import Weights, load_preset, make_workload
from reference.layout import SAVES
from reference.tolerance import tolerance

TOKENS = (256, 2048)
BLOCKS = ("eager", "grouped")
SETTLE_S = 0.02  # PyTorch's workers spin for 5 ms after their work
COLUMNS = {
    "save": "", "tokens": "d", "forward_ms": "", "step_ms": "", "times_forward": ".2f", "eager_ms": "",
    "grouped_ms": "", "sums_go_on": ".2f", "ratio": ".2f", "kept_mb": ".1f", "error": ".1e", "ok": "",
}  # fmt: skip


def main() -> int:
    parser = parser_of(__doc__)
    listed = ",".join(map(str, TOKENS))
    parser.add_argument("--tokens", type=integers(1), metavar="N[,N]", help=f"of a call [{listed}]")
    parser.add_argument(
        "--save", type=_saves, default=SAVES[:1], metavar="NAMES", help=f"out of {','.join(SAVES)} [rows+up]"
    )
    parser.add_argument("--repeats", type=integer(1), default=9, metavar="N", help="steps of each variant [9]")
    args = parser.parse_args()
    if importlib.util.find_spec("torch") is None:
        leave("PyTorch is not installed: pip install 'flashmoe-numba[torch]'", args)
    load, rows = os.getloadavg()[0], []
    for save in SAVES if args.smoke else args.save:
        rows += measure(
            save, [5] if args.smoke else args.tokens or TOKENS, 2 if args.smoke else args.repeats, args.smoke
        )
    show([{key: _shown(value) for key, value in row.items()} for row in rows], COLUMNS)
    store([row | machine() | {"load": load} | program(("numpy", "numba", "torch")) for row in rows], args.json)
    return 0 if all(row["ok"] for row in rows) else 1


def _saves(text: str) -> list[str]:
    """An argparse type."""
    if not set(text.split(",")) <= set(SAVES):
        raise argparse.ArgumentTypeError(f"must be out of {', '.join(SAVES)}; got {text}")
    return text.split(",")


def _shown(value: Any) -> Any:
    return f"{value[1]:.1f} ({value[0]:.1f}-{value[2]:.1f})" if isinstance(value, list) else value


def measure(save: str, tokens: list[int], repeats: int, smoke: bool) -> list[Row]:
    """One row for each number of tokens."""
    import torch

    threads = default_processors(1)
    torch.set_num_threads(threads)
    config = load_preset("laptop-tiny" if smoke else "laptop-gemm", num_ranks=1, num_tokens=max(tokens))
    weights = Weights.random(config)
    with FlashMoE(config, weights, num_processors=threads, save=save) as layer:
        steps = Steps(layer, weights)
        found = [steps.at(count, repeats) for count in sorted(tokens, reverse=True)]
    return [{"save": save, "dtype": config.dtype, "threads": threads, "repeats": repeats, **row} for row in found[::-1]]


class Steps:
    """Forwards, and steps, of the layer and of PyTorch's blocks."""

    def __init__(self, layer: FlashMoE, weights: Weights) -> None:
        from torch_block import TorchBlock

        self._layer, self._block = layer, TorchBlock(layer.config, weights, trains=True)

    def at(self, tokens: int, repeats: int) -> Row:
        config = self._layer.config
        x = [make_workload("uniform", config, tokens, seed).x[0] for seed in range(repeats)]
        dy = [make_workload("uniform", config, tokens, seed + repeats).x[0] for seed in range(repeats)]
        variants: dict[str, Callable[[int], object]] = {
            "forward": lambda turn: self._layer([x[turn]]),
            "step": lambda turn: self._step(x[turn], dy[turn]),
            "more": lambda turn: self._step(x[turn], dy[turn], sums),
            "eager": lambda turn: self._block.step("eager", x[turn], dy[turn]),
            "grouped": lambda turn: self._block.step("grouped", x[turn], dy[turn]),
        }
        error, limit = self._compare(x[0], dy[0])
        sums = self._step(x[0], dy[0])
        times: dict[str, list[float]] = {name: [] for name in variants}
        for turn in range(-1, repeats):  # the first is not counted
            for name, run in variants.items():
                time.sleep(SETTLE_S)
                start = time.perf_counter()
                run(max(turn, 0))
                if turn >= 0:
                    times[name].append(1e3 * (time.perf_counter() - start))
        quartiles = {name: np.quantile(ms, (0.25, 0.5, 0.75)).tolist() for name, ms in times.items()}
        middle = {name: ms[1] for name, ms in quartiles.items()}
        return {
            "tokens": tokens,
            **{f"{name}_ms": ms for name, ms in quartiles.items()},
            "times_forward": middle["step"] / middle["forward"],
            "sums_go_on": middle["more"] / middle["forward"],
            "ratio": middle["step"] / min(middle[name] for name in BLOCKS),
            "kept_mb": self._kept / 1e6,
            "error": error,
            "tolerance": limit,
            "ok": error <= limit,
        }

    def _step(self, x: np.ndarray, dy: np.ndarray, into: Any = None) -> Any:
        _, saved = self._layer.forward([x])
        self._kept = saved.num_bytes
        return self._layer.backward(saved, [dy], into=into)

    def _compare(self, x: np.ndarray, dy: np.ndarray) -> tuple[float, float]:
        """How far gradients are from eager's by the layer's routing, of the largest, and how far they may be."""
        self._layer([x])
        routing = self._layer.routing[0]
        _, saved = self._layer.forward([x], topk_idx=[routing.topk_idx], topk_weights=[routing.topk_weights])
        mine = self._layer.backward(saved, [dy])
        theirs = self._block.step("eager", x, dy, routing)
        found = {"x": mine.x[0], "topk_weights": mine.topk_weights[0], **_matrices(mine.weights[0])}
        errors = [float(np.abs(found[name] - array).max() / np.abs(array).max()) for name, array in theirs.items()]
        return max(errors), 2 * tolerance(self._layer.config)


def _matrices(weights: Weights) -> dict[str, np.ndarray]:
    assert weights.gate_proj is not None
    return {"up": np.concatenate([weights.gate_proj, weights.up_proj], axis=1), "down": weights.down_proj}


if __name__ == "__main__":
    sys.exit(main())
