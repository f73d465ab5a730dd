"""Are two commits the same but for speed? For changes that should change nothing.

    .venv/bin/python tests/compare_commits.py 8e82464          (against HEAD; or: make compare BASE=8e82464)

checks both out side by side and compares what they compute: every atomic access of some runs of every small world of
the explorer, with its results; the latencies of all policies on some worlds; all that `flashmoe validate` says. Then it
counts lines of code of the three packages, and with --speed N times both in turn, N times: the layer beside BLAS, the
explorer, the compiler, the simulator. Exit status 1 if a number differs.
"""

import argparse
import ast
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("reference", "sim", "flashmoe_numba")
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}

EXPLORED = """
import hashlib, json, sys
from flashmoe_numba.explore.search import Explorer, Search, watched_kernel
from flashmoe_numba.explore.worlds import WORLDS
found = {}
with watched_kernel(None) as kernel:
    for name, spec in WORLDS.items():
        for strategy in ("random", "pct", "round-robin"):
            explorer, digest = Explorer(Search(spec=spec, strategy=strategy), kernel), hashlib.sha256()
            number = {region: i for i, region in enumerate(explorer.world.regions.values())}
            def hear(actor, verb, region, i, value):
                digest.update(repr((actor.index, actor.epoch, verb, number[region], i, int(value))).encode())
            explorer.world.memory.listener = hear
            for seed in range(int(sys.argv[1])):
                run = explorer.world.run(explorer.strategy(seed), explorer.late_seed(seed))
                digest.update(repr((run.switches, len(run.reports))).encode())
                digest.update(b"".join(call.y.tobytes() for calls in run.calls for call in calls))
            found[f"{name}, {strategy}"] = digest.hexdigest()[:16]
print(json.dumps(found))
"""

SIMULATED = """
import json, sim
found = {}
for preset, machine, tokens in (("olmoe-1b-7b", "8xH100", 256), ("llama-4-scout", "2x8xH100", 1024)):
    hardware = sim.load_hardware(machine)
    config = sim.load_preset(preset, num_ranks=hardware.num_gpus, num_tokens=tokens, shared_ffn=0)
    for routing in ("even", "zipf:1"):
        parts = dict(routing=sim.make_routing(routing, config, 3), precision=sim.precision("bfloat16"))
        world = sim.World(config=config, hardware=hardware, **parts)
        for policy in sim.POLICY_NAMES:
            report = sim.report(sim.simulate(policy, world))
            found[f"{policy} on {machine}, {routing}"] = [report.latency_us, report.tensor_busy, report.idle]
print(json.dumps(found))
"""

SIMULATOR_SPEED = """
import time, sim
config = sim.load_preset("deepseek-v3", num_ranks=32, num_tokens=1024, shared_ffn=0)
parts = dict(routing=sim.make_routing("uniform", config), precision=sim.precision("bfloat16"))
world = sim.World(config=config, hardware=sim.load_hardware("4x8xH100"), **parts)
sim.simulate("flashmoe", world)
start = time.perf_counter()
made = sim.simulate("flashmoe", world)
print(made.graph.num_tasks / (time.perf_counter() - start))
"""

COMPILER_SPEED = """
import os, tempfile, time
from flashmoe_numba import FlashMoE
from reference import MoEConfig, Weights
config = MoEConfig(num_ranks=1, num_tokens=8, hidden=16, ffn=16, num_experts=2, num_topk=1)
with tempfile.TemporaryDirectory() as folder:
    os.environ["FLASHMOE_CACHE_DIR"] = folder
    start = time.process_time()
    FlashMoE(config, Weights.random(config, seed=0)).close()
    print(60 / (time.process_time() - start))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="the commit to compare with")
    parser.add_argument("commit", nargs="?", default="HEAD", help="the other one [HEAD]")
    parser.add_argument("--seeds", type=int, default=4, help="runs of each world and strategy [4]")
    parser.add_argument("--speed", type=int, default=0, metavar="N", help="time both in turn, N times [0]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trees = [check_out(commit, Path(folder) / name) for commit, name in ((args.base, "base"), (args.commit, "new"))]
        same = [compare(name, [probe(tree) for tree in trees]) for name, probe in probes(args.seeds).items()]
        for tree in trees:
            print(f"{tree.name}: code lines {code_lines(tree)}")
        for name, probe in speeds().items() if args.speed else ():
            time_in_turn(name, probe, trees, args.speed)
    return 0 if all(same) else 1


def check_out(commit: str, folder: Path) -> Path:
    folder.mkdir()
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x"], cwd=folder, input=archive, check=True)
    return folder


def python(tree: Path, *arguments: str) -> str:
    """What Python prints with the packages of a checkout."""
    env = os.environ | {"PYTHONPATH": str(tree)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=tree, env=env, check=True, capture_output=True, text=True).stdout


def flashmoe(tree: Path, *arguments: str) -> str:
    return python(tree, "-m", "flashmoe_numba", *arguments)


def probes(seeds: int):
    """{what: a function of a checkout that gives numbers by name}"""
    return {
        "explorer": lambda tree: json.loads(python(tree, "-c", EXPLORED, str(seeds))),
        "simulator": lambda tree: json.loads(python(tree, "-c", SIMULATED)),
        "flashmoe validate": lambda tree: dict(enumerate(flashmoe(tree, "validate").splitlines())),
    }


def compare(name: str, found: list[dict]) -> bool:
    base, new = found
    different = [key for key in base.keys() | new.keys() if base.get(key) != new.get(key)]
    print(f"{name}: {len(base)} compared, {len(different)} differ", flush=True)
    for key in different[:10]:
        print(f"    {key}: {base.get(key)} => {new.get(key)}")
    return not different


# ---- lines


def code_lines(tree: Path) -> dict[str, int]:
    """Of each package, and their sum: lines with code, docstrings, comments and blank lines aside."""
    found = {package: sum(map(_code_lines, (tree / package).rglob("*.py"))) for package in PACKAGES}
    return found | {"all": sum(found.values())}


def _code_lines(file: Path) -> int:
    text = file.read_text(encoding="utf-8")
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return len(lines)


# ---- speed


def speeds():
    """{what: a function of a checkout that gives a rate}"""
    gemm = ["run", "--preset", "laptop-gemm", "--ranks", "1", "--json", "-"]
    explored = ["explore", "--world", "plain", "--seeds", "100", "--jobs", "1", "--json", "-"]
    return {
        "blas_share": lambda tree: json.loads(flashmoe(tree, *gemm))["blas_share"],
        "explorer, runs/s": lambda tree: json.loads(flashmoe(tree, *explored))["runs_per_process_s"],
        "kernels compiled in a minute of one core": lambda tree: float(python(tree, "-c", COMPILER_SPEED)),
        "simulator, tasks/s": lambda tree: float(python(tree, "-c", SIMULATOR_SPEED)),
    }


def time_in_turn(name, probe, trees, times: int) -> None:
    pairs = [[probe(tree) for tree in trees] for _ in range(times)]
    base, new = zip(*pairs, strict=True)
    ratio = statistics.median(after / before for before, after in pairs)
    print(f"{name}: {_list(base)} => {_list(new)}, median ratio {ratio:.3f}", flush=True)


def _list(numbers) -> str:
    return " ".join(f"{number:.4g}" for number in numbers)


if __name__ == "__main__":
    sys.exit(main())
