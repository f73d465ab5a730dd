"""Small runs for NVIDIA's compute-sanitizer, which comes with the CUDA toolkit:

    compute-sanitizer --tool memcheck --error-exitcode 9 python tests/cuda/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 9 python tests/cuda/sanitize.py

Tensor cores and lanes, two virtual ranks, full and ragged and empty calls, each result compared with the oracle. Under
the sanitizer everything takes up to a hundred times as long; without it, seconds.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

from cases import assert_equals_oracle, random_tokens, tiny_config  # noqa: E402
from gpu_cases import call, make_layer, tensor_config, why_not  # noqa: E402

from reference import Weights  # noqa: E402

DEADLINE_S = 3600.0  # what the sanitizer slows down is not lost


def configs():
    sizes = dict(num_ranks=2, num_tokens=20, num_experts=4)
    yield tensor_config(**sizes)
    yield tensor_config(**sizes, dtype="bfloat16", gated=False, hidden=72)
    for dtype in ("float32", "float64"):
        yield tiny_config(dtype=dtype)


def main() -> int:
    reason = why_not()
    if reason:
        print(f"skipped: {reason}")
        return 0
    for config in configs():
        weights = Weights.random(config, bias=True)
        with make_layer(config, weights, num_processors=2, deadline_s=DEADLINE_S, trace=True) as layer:
            for counts in ([config.num_tokens] * 2, [1, 0], [0, 0], [config.num_tokens, 3]):
                x = random_tokens(config, counts)
                y = call(layer, x)
                assert_equals_oracle(y, x, weights, config, layer.routing)
        print(f"equals the oracle: {config}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
