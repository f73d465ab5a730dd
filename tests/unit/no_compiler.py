"""What works where Numba compiles nothing; a program, which test_no_compiler.py runs under NUMBA_DISABLE_JIT=1."""

import contextlib
import io
import json
import os
import warnings
from dataclasses import fields

import numpy as np

from flashmoe_numba import FlashMoE, cli
from flashmoe_numba.commands.doctor import host
from reference import MoEConfig, Weights, moe_layer
from sim.engine import compiled, plain
from sim.engine.graph import GraphBuilder
from sim.engine.kinds import GATE, GEMM0

CONFIG = MoEConfig(num_ranks=2, num_tokens=3, hidden=5, ffn=4, num_experts=4, num_topk=2)
WEIGHTS = Weights.random(CONFIG)
X = np.random.default_rng(0).standard_normal((2, 3, 5)).astype(np.float32)


def layer_error():
    """Between the fibers' result and the oracle's."""
    with FlashMoE(CONFIG, WEIGHTS, backend="fibers") as layer:
        y = layer(X)
    return max(float(np.abs(of_rank - moe_layer(x, WEIGHTS, CONFIG)).max()) for x, of_rank in zip(X, y, strict=True))


def refusals():
    said = {}
    for backend in ("cpu", "cuda"):
        try:
            FlashMoE(CONFIG, WEIGHTS, backend=backend)
        except ValueError as error:
            said[backend] = str(error)
    return said


def command_line(*arguments):
    """(exit status, what it wrote to stderr)"""
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        return cli.main(list(arguments)), err.getvalue()


def graph():
    builder = GraphBuilder()
    slots, out = builder.add_server("SM slots", 0, 2), builder.add_link("out", 0, 2.0)
    first = builder.add(GATE, 0, server=slots, count=3, duration_ns=7)
    then = builder.add(GEMM0, 0, server=slots, count=2, duration_ns=5, nbytes=30, egress=out)
    builder.edge(first, then)
    return builder.build()


def simulations():
    """(do the two engines agree, the numbers of runs that were kept, the warnings)"""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        kept, forgotten = compiled.run(graph(), tie_seed=3), compiled.run(graph(), tie_seed=3, keep_runs=False)
    right = plain.run(graph(), tie_seed=3)
    same = all(np.array_equal(getattr(kept, field.name), getattr(right, field.name)) for field in fields(right))
    return same, [len(kept.run_node), len(forgotten.run_node)], [str(warning.message) for warning in said]


if __name__ == "__main__":
    check = host.check_compiler()
    facts = {
        "layer_error": layer_error(),
        "refusals": refusals(),
        "run": command_line("run", "--preset", "laptop-tiny", "--ranks", "2"),
        "sim": command_line("sim", "--policy", "flashmoe,bulk", "--preset", "laptop-tiny", "--json", os.devnull),
        "simulations": simulations(),
        "doctor": [check.status, check.found, check.fix],
    }
    print(json.dumps(facts))
