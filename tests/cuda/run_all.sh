#!/usr/bin/env bash
# Everything that needs a GPU: tests, sanitizer, studies. Usage: tests/cuda/run_all.sh [folder for results]
# Rows of the studies and the logs go to experiments/results/<GPU>-<date>/. Without a GPU it says so and ends with 2.
# A step that fails does not keep the others from running; the exit status is the number of failed steps.
set -uo pipefail
cd "$(dirname "$0")/../.."
python="${PYTHON:-.venv/bin/python}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

reason="$("$python" -c 'import sys; sys.path[:0] = ["tests", "tests/cuda"]; from gpu_cases import why_not; print(why_not() or "")')" || exit 2
if [ -n "$reason" ]; then
    echo "tests/cuda/run_all.sh: nothing was run: $reason" >&2
    exit 2
fi
name="$("$python" -c 'from flashmoe_numba.gpu.driver import ask_driver; print(ask_driver().devices[0].name.replace(" ", "-"))')"
results="${1:-experiments/results/$name-$(date -u +%Y-%m-%dT%H%M)}"
mkdir -p "$results"

failed=0
step() { # step NAME COMMAND...: its output goes to NAME.log and here
    local log="$results/$1.log"
    shift
    printf '\n=== %s\n' "$*" | tee "$log"
    "$@" 2>&1 | tee -a "$log"
    local code=${PIPESTATUS[0]}
    if [ "$code" -ne 0 ]; then
        failed=$((failed + 1))
        echo "=== failed with exit status $code" | tee -a "$log"
    fi
}

step doctor "$python" -m flashmoe_numba doctor
step pieces "$python" -m pytest -v tests/cuda/test_gpu_pieces.py
step tests "$python" -m pytest -v tests/cuda --deselect tests/cuda/test_gpu_pieces.py
if command -v compute-sanitizer >/dev/null; then
    step memcheck compute-sanitizer --tool memcheck --error-exitcode 9 "$python" tests/cuda/sanitize.py
    step racecheck compute-sanitizer --tool racecheck --error-exitcode 9 "$python" tests/cuda/sanitize.py
else
    echo "=== no compute-sanitizer here, which comes with the CUDA toolkit: left out" | tee "$results/sanitizer.log"
fi
step roof "$python" experiments/20_gpu_roof.py --json "$results/roof.jsonl"
step signals "$python" experiments/21_gpu_signals.py --json "$results/signals.jsonl"
step virtual_ranks "$python" experiments/22_gpu_virtual_ranks.py --json "$results/virtual_ranks.jsonl"
step calibrate "$python" -m flashmoe_numba calibrate --backend cuda --ranks 8 --dtype float16 --out "$results/calibrated.toml"
step beside "$python" experiments/16_beside_the_kernel.py --backend cuda --ranks 8 --dtype float16 --traces "$results/traces" --json "$results/beside.jsonl"
step run "$python" -m flashmoe_numba run --backend cuda --virtual-ranks 8 --dtype float16 --preset laptop-gemm --tokens 256
printf '\n%d steps failed; results are in %s\n' "$failed" "$results"
exit "$failed"
