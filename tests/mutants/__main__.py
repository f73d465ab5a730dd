"""Does the suite notice small faults? Mutants by rule (rules.py), each tried on the tests that cover it (suites.py).

    PYTHONPATH=tests .venv/bin/python -m mutants --seed 7 --number 300      (or: make mutants SEED=7)

draws mutants by the seed, from the rules in turn so that each has its share, and tries them in copies of the project.
It prints those that no test noticed, with the reason where docs/mutants.md has one, and fails if more than a
twentieth of all have none. Those that it explains are taken to live still, unless `--again` is given. A mutant takes
about 15 s of a core, one that lives a minute or two.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from itertools import chain, zip_longest
from pathlib import Path
from queue import SimpleQueue

from .bench import HUNG, Bench, Verdict
from .rules import Mutant, find_mutants
from .suites import Stage, files_with_suites

ROOT = Path(__file__).resolve().parents[2]
EXPLAINED = ROOT / "docs" / "mutants.md"
MOST_UNEXPLAINED = 0.05
SLACK, SLACK_S = 4, 15  # what takes so many times as long as without a mutant, and so much longer, hangs
FATES = ("noticed", "hung", "explained", "unexplained")
Results = list[tuple[Mutant, Verdict]]


def main() -> int:
    flags = parse()
    stages = files_with_suites(ROOT)
    mutants = sample(
        [m for m in find_mutants(list(stages), ROOT) if flags.only in f"{m.file} {m.name}"], flags.number, flags.seed
    )
    if flags.list:
        print(*(mutant.name for mutant in mutants), sep="\n")
        return 0
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and tests need it
    explained = explanations(EXPLAINED.read_text(encoding="utf-8"))
    known = [] if flags.again else [mutant for mutant in mutants if mutant.name in explained]
    with tempfile.TemporaryDirectory(prefix="flashmoe-mutants-") as folder:
        results = try_all([mutant for mutant in mutants if mutant not in known], stages, flags.jobs, Path(folder))
    return report([*results, *((mutant, Verdict("", 0.0)) for mutant in known)], explained)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="which mutants are drawn")
    parser.add_argument("--number", type=int, default=300, help="how many; default: %(default)s")
    parser.add_argument("--jobs", type=int, default=2, help="copies that work side by side; default: %(default)s")
    parser.add_argument("--only", default="", metavar="TEXT", help="draw from those with this in their file or name")
    parser.add_argument("--again", action="store_true", help="try also those that docs/mutants.md explains")
    parser.add_argument("--list", action="store_true", help="print names, try nothing")
    return parser.parse_args()


def sample(mutants: list[Mutant], number: int, seed: int) -> list[Mutant]:
    """Up to `number` of the mutants: one of each rule in turn, until a rule has no more."""
    choose = random.Random(seed)
    by_rule = [[m for m in mutants if m.rule == rule] for rule in sorted({m.rule for m in mutants})]
    turns = zip_longest(*(choose.sample(some, len(some)) for some in by_rule))
    return [mutant for mutant in chain.from_iterable(turns) if mutant is not None][:number]


def explanations(text: str) -> dict[str, str]:
    """{name: why no test notices it}, from the rows "| `name` | why |" of the document."""
    return dict(re.findall(r"^\| `` (.+) `` \| (.+) \|$", text, re.MULTILINE))


def try_all(mutants: list[Mutant], stages: dict[Path, list[Stage]], jobs: int, folder: Path) -> Results:
    """Check that the suites pass without mutants, then try each; tells how it goes."""
    kernels = kept_kernels(folder / "kernels")
    benches = [Bench(ROOT, folder / f"copy{job}", kernels) for job in range(jobs)]
    free: SimpleQueue[Bench] = SimpleQueue()
    for bench in benches:
        free.put(bench)

    def on_a_bench(method: str, *args: object) -> Verdict:
        bench = free.get()
        try:
            return getattr(bench, method)(*args)
        finally:
            free.put(bench)

    pool = ThreadPoolExecutor(jobs)
    try:
        needed = list(dict.fromkeys(stage for mutant in mutants for stage in stages[mutant.file]))
        limits_s = check_all({pool.submit(on_a_bench, "check", stage): stage for stage in needed})
        covers = {file: {stage: limits_s.get(stage, 0) for stage in some} for file, some in stages.items()}
        return judge_all({pool.submit(on_a_bench, "judge", mutant, covers[mutant.file]): mutant for mutant in mutants})
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for bench in benches:
            bench.stop()
        pool.shutdown()


def check_all(checks: dict[Future[Verdict], Stage]) -> dict[Stage, float]:
    """{stage: seconds after which it hangs}, once all have passed without a mutant."""
    limits_s = {}
    for stage, verdict in in_order_of_end(checks):
        print(f"{verdict.seconds:6.1f} s without mutants: {stage.tests}", flush=True)
        if verdict.killed_by:
            raise SystemExit(f"{verdict.killed_by} fails without a mutant: nothing can be learnt")
        limits_s[stage] = stage.compile_s + SLACK * verdict.seconds + SLACK_S
    return limits_s


def judge_all(tries: dict[Future[Verdict], Mutant]) -> Results:
    results = []
    for mutant, verdict in in_order_of_end(tries):
        print(f"{verdict.seconds:6.1f} s {mutant.name}\n         {verdict.killed_by or 'LIVES'}", flush=True)
        results.append((mutant, verdict))
    return results


def in_order_of_end(futures: dict[Future[Verdict], object]) -> Iterator[tuple]:
    for future in as_completed(futures):
        yield futures[future], future.result()


def kept_kernels(folder: Path) -> Path:
    """A cache of compiled kernels that begins with the user's, so that only mutants have to be compiled."""
    sys.path.insert(0, str(ROOT))
    from reference.cache_folder import cache_folder

    if not folder.exists() and cache_folder().is_dir():
        shutil.copytree(cache_folder(), folder)
    return folder


def report(results: Results, explained: dict[str, str]) -> int:
    """Print survivors and a table by rule; the exit status."""
    survivors = [mutant for mutant, verdict in results if not verdict.killed_by]
    unexplained = [mutant for mutant in survivors if mutant.name not in explained]
    print("\nSurvivors:")
    for mutant in sorted(survivors, key=lambda mutant: mutant.name):
        print(f"| `` {mutant.name} `` | {explained.get(mutant.name, 'NOT EXPLAINED')} |")
    by_rule = Counter((mutant.rule, fate(mutant, verdict, explained)) for mutant, verdict in results)
    print(f"\n{'rule':20}" + "".join(f"{name:>13}" for name in FATES))
    for rule in sorted({rule for rule, _ in by_rule}):
        print(f"{rule:20}" + "".join(f"{by_rule[rule, name]:13}" for name in FATES))
    share = len(unexplained) / max(1, len(results))
    print(f"{len(unexplained)} of {len(results)} mutants live unexplained: {share:.1%}, at most {MOST_UNEXPLAINED:.0%}")
    return int(share > MOST_UNEXPLAINED)


def fate(mutant: Mutant, verdict: Verdict, explained: dict[str, str]) -> str:
    if verdict.killed_by:
        return "hung" if verdict.killed_by == HUNG else "noticed"
    return "explained" if mutant.name in explained else "unexplained"


if __name__ == "__main__":
    sys.exit(main())
