"""The mutants of tests/mutants: each rule's edits of small functions, names that last, and a survivor that is seen."""

import ast
import subprocess
from pathlib import Path

import pytest
from mutants.__main__ import EXPLAINED, explanations
from mutants.bench import HUNG, Bench
from mutants.rules import find_mutants, mutants_of
from mutants.suites import Stage, files_with_suites

ROOT = Path(__file__).resolve().parents[2]


def edits(*lines):
    """{rule: the edits it makes in a function of these lines}, as (old, new)."""
    text = "def f(a, b):\n" + "".join(f"    {line}\n" for line in lines)
    found = {}
    for mutant in mutants_of(text, Path("toy.py")):
        ast.parse(mutant.edited(text.encode()))
        old = text.encode()[mutant.start : mutant.end].decode()
        found.setdefault(mutant.rule, []).append((old, mutant.new))
    return found


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("return a < b", {"comparison": [("a < b", "a <= b")]}),
        ("return a == b and b is not None", {"comparison": [
            ("a == b and b is not None", "a == b or b is not None"),
            ("a == b", "a != b"), ("b is not None", "b is None"),
        ]}),
        ("return 0 <= a < b", {
            "comparison": [("0 <= a < b", "0 < a < b"), ("0 <= a < b", "0 <= a <= b")], "off by one": [("0", "1")],
        }),
        ("for i in range(a, c): pass", {"off by one": [("c", "c - 1")], "swapped argument": [("a, c", "c, a")]}),
        ("a[3] += b", {"dropped statement": [("a[3] += b", "pass")], "off by one": [("3", "4")]}),
        ("g(a,  c)", {"dropped statement": [("g(a,  c)", "pass")], "swapped argument": [("a,  c", "c, a")]}),
        ("c = g(a, a)", {}),
        ("return max(a, c) + g(*a, c) + g(p, a)", {}),
        ("raise ValueError(f'{a < 1}')", {"dropped statement": [("raise ValueError(f'{a < 1}')", "pass")]}),
        ("assert a < 1, g(a, b)", {}),
        ("c: Literal[1] = True", {}),
        ("st_release(a, c, 1)", {
            "weakened order": [("st_release(a, c, 1)", "a[c] = 1")],
            "dropped statement": [("st_release(a, c, 1)", "pass")],
            "swapped argument": [("a, c", "c, a"), ("c, 1", "1, c")], "off by one": [("1", "2")],
        }),
        ("block_sync()", {"weakened order": [("block_sync()", "pass")]}),
        ("return ld_acquire(words, b)", {"weakened order": [("ld_acquire", "ld_relaxed")]}),
        ("return lambda: b.load_atomic('acquire')", {"weakened order": [("'acquire'", '"monotonic"')]}),
    ],
)  # fmt: skip
def test_each_rule_makes_these_edits_and_no_others(line, expected):
    assert edits(line) == expected


def test_docstrings_decorators_and_annotations_stay():
    text = '@cache(1)\ndef f(a: Literal[1] = 2) -> Literal[3]:\n    """A < 1"""\n\n\nFIVE = 5\n'
    assert list(mutants_of(text, Path("toy.py"))) == []


def test_a_weak_load_is_there_to_be_called():
    [mutant] = mutants_of("def f(words):\n    return ld_acquire(words, i)\n", Path("toy.py"))
    assert mutant.edited(b"def f(words):\n    return ld_acquire(words, i)\n").decode() == (
        "def f(words):\n    return ld_relaxed(words, i)\n\nfrom flashmoe_numba.device import ld_relaxed\n"
    )


HERE = """
class Box:
    def put(self, a):
        g(a)
        if a:
            g(a)
put = lambda b, i: b[i + 1]
"""
ELSEWHERE = """
import os
# words
put = lambda b, i: b[i + 1]
class Box:
    def put(self, a):
        # ÄÖ
        g(a)

        if a:
            g(a)
"""


def test_names_outlive_a_move_and_differ(tmp_path):
    names = {
        "Box.put: dropped statement: {g(a) => pass}",
        "Box.put: dropped statement: {g(a) => pass} (2)",
        "put: off by one: put = lambda b, i: b[i + {1 => 2}]",
    }
    for file, text in (("here.py", HERE), ("elsewhere.py", ELSEWHERE)):
        (tmp_path / file).write_text(text, encoding="utf-8")
        assert {mutant.name for mutant in find_mutants([Path(file)], tmp_path)} == names


def test_every_mutant_of_the_project_is_a_program_under_a_name_of_its_own():
    files = files_with_suites(ROOT)
    mutants = find_mutants(list(files), ROOT)
    assert len({mutant.name for mutant in mutants}) == len(mutants) > 1500
    for mutant in mutants[::7]:  # of each file and rule
        original = (ROOT / mutant.file).read_bytes()
        edited = mutant.edited(original)
        assert edited != original
        ast.parse(edited)
    for stage in {stage for stages in files.values() for stage in stages}:
        paths = [test.split("::")[0] for test in stage.tests.split() if not test.startswith("-")]
        assert all((ROOT / path).exists() for path in paths), f"{stage.tests}"


def test_every_mutant_that_is_explained_is_there():
    explained = explanations(EXPLAINED.read_text(encoding="utf-8"))
    assert len(explained) > 20
    assert explained.keys() <= {mutant.name for mutant in find_mutants(list(files_with_suites(ROOT)), ROOT)}


TOY = """
def most(a, b):
    if a >= b:
        return a
    return b

def wait(a):
    while a < 1:
        a += 1
    return a
"""
TOY_TEST = "from toy import most, wait\n\n\ndef test_both():\n    assert most(2, 1) == 2\n    assert wait(0) == 1\n"


def test_survivors_are_told_from_those_that_fail_or_hang(tmp_path):
    root, copy = tmp_path / "root", tmp_path / "copy"
    root.mkdir()
    (root / "toy.py").write_text(TOY)
    (root / "test_toy.py").write_text(TOY_TEST)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    bench, stage = Bench(root, copy, tmp_path / "cache"), Stage(0, "--noconftest test_toy.py")
    mutants = {mutant.name: mutant for mutant in find_mutants([Path("toy.py")], root)}
    for name, limit_s, expected in (
        ("most: comparison: if {a >= b => a > b}", 60, ""),
        ("wait: off by one: while a < {1 => 2}", 60, "test_toy.py::test_both"),
        ("wait: dropped statement: {a += 1 => pass}", 1, HUNG),
    ):
        assert bench.judge(mutants[name], {stage: limit_s}).killed_by == expected, name
    assert (copy / "toy.py").read_text() == (root / "toy.py").read_text() == TOY
