"""The import rule: `reference <- sim`, `reference <- flashmoe_numba`; only the commands of `cli.py` see both.

Read from the source by `ast`, so that an import inside a function or under TYPE_CHECKING counts like any other.
"""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = {"reference", "sim", "flashmoe_numba", "experiments", "tests"}
MAY_IMPORT = {"reference": set(), "sim": {"reference"}, "flashmoe_numba": {"reference"}}
SEES_ALL = (Path("flashmoe_numba/cli.py"), Path("flashmoe_numba/commands"))
CUDA = ("numba.cuda", "numba_cuda", "numba_cuda_mlir")
COSTLY = ["ml_dtypes", "safetensors", "numba", "llvmlite", "mpi4py", "matplotlib", "scipy", "greenlet", "tqdm"]


@cache  # by the text: all but one of a planted copy's files are read again and again
def imported_names(source: str, package: tuple[str, ...]) -> frozenset[str]:
    """Absolute dotted names that a module of a package imports."""
    return frozenset(_imported_names(ast.parse(source), package))


def _imported_names(tree: ast.Module, package: tuple[str, ...]) -> Iterator[str]:
    """`from a import b` gives `a` and `a.b`, as b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from [base, *(f"{base}.{alias.name}".lstrip(".") for alias in node.names)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))


def violations(root: Path) -> list[str]:
    """One line per import that breaks the rule, and one if `numba.cuda` is imported in more than one module."""
    found, cuda_files = [], []
    for package, allowed in MAY_IMPORT.items():
        for file in sorted((root / package).rglob("*.py")):
            path = file.relative_to(root)
            names = imported_names(file.read_text(encoding="utf-8"), path.parent.parts)
            if not {path, path.parent} & {*SEES_ALL}:
                forbidden = {name.split(".")[0] for name in names} & OURS - allowed - {package}
                found += [f"{path} imports {name}" for name in sorted(forbidden)]
            if any(name == cuda or name.startswith(f"{cuda}.") for name in names for cuda in CUDA):
                cuda_files.append(path)
    found += [f"{path} imports numba.cuda" for path in cuda_files if path.parts[0] != "flashmoe_numba"]
    if len(cuda_files) > 1:
        found.append(f"numba.cuda is imported in {len(cuda_files)} modules: {', '.join(map(str, cuda_files))}")
    return found


def test_imports_point_one_way():
    assert (ROOT / "reference/__init__.py").exists()
    assert (ROOT / "flashmoe_numba/__init__.py").exists()
    assert violations(ROOT) == []


@pytest.fixture
def copy(tmp_path):
    """The packages as they are, to plant faults in."""
    for package in MAY_IMPORT:
        if (ROOT / package).exists():
            shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def plant(root: Path, path: str, source: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(source, encoding="utf-8")


@pytest.mark.parametrize(
    ("path", "source", "imported"),
    [
        ("reference/planted.py", "import sim", "sim"),
        ("reference/planted.py", "import sim.engine.plain as engine", "sim"),
        ("reference/planted.py", "from flashmoe_numba.device import jit", "flashmoe_numba"),
        ("reference/planted.py", "def f():\n    from flashmoe_numba import layer", "flashmoe_numba"),
        ("reference/planted.py", "import importlib\nimportlib.import_module('sim.engine.plain')", "sim"),
        ("reference/planted.py", "__import__('flashmoe_numba')", "flashmoe_numba"),
        ("reference/planted.py", "from tests.unit import helpers", "tests"),
        ("reference/deep/planted.py", "from ...sim import engine", "sim"),
        ("reference/deep/planted.py", "from ... import sim", "sim"),
        ("sim/planted.py", "import flashmoe_numba", "flashmoe_numba"),
        ("sim/planted.py", "from flashmoe_numba.kernel import gate", "flashmoe_numba"),
        ("flashmoe_numba/planted.py", "import sim", "sim"),
        ("flashmoe_numba/kernel/planted.py", "from sim.engine import run", "sim"),
        ("flashmoe_numba/kernel/cli.py", "import sim", "sim"),
        ("flashmoe_numba/bench/commands.py", "import sim", "sim"),
        ("flashmoe_numba/planted.py", "if TYPE_CHECKING:\n    import experiments", "experiments"),
        ("reference/planted.py", "from numba import cuda", "numba.cuda"),
        ("sim/planted.py", "import numba.cuda.extending", "numba.cuda"),
    ],
)
def test_finds_a_planted_import(copy, path, source, imported):
    plant(copy, path, source)
    assert f"{path} imports {imported}" in violations(copy)


@pytest.mark.parametrize(
    "source",
    [
        "import numba.cuda",
        "from numba import cuda",
        "from numba.cuda import jit",
        "from numba_cuda_mlir import cuda",
    ],
)
def test_finds_a_second_module_that_imports_cuda(copy, source):
    plant(copy, "flashmoe_numba/device/planted_a.py", "from numba import cuda")
    plant(copy, "flashmoe_numba/kernel/planted_b.py", f"def f():\n    {source}")
    (found,) = violations(copy)
    assert "planted_a.py" in found
    assert "planted_b.py" in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("flashmoe_numba/cli.py", "import sim\nfrom sim.engine.plain import run\nimport reference"),
        ("flashmoe_numba/commands/planted.py", "from sim.engine import run\nfrom reference import MoEConfig"),
        ("flashmoe_numba/kernel/planted.py", "import reference\nfrom ..device import cuda\nfrom numba import njit"),
        ("sim/planted.py", "from reference import MoEConfig\nimport simpy\nimport numba"),
        ("reference/planted.py", "from . import config\nimport numpy\nimport simulators"),
    ],
)
def test_accepts_a_planted_import_that_is_legal(copy, path, source):
    plant(copy, path, source)
    assert violations(copy) == []


@pytest.mark.parametrize("package", ["reference", "sim"])
def test_import_loads_numpy_and_the_standard_library_only(package):
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); before = set(sys.modules); __import__(sys.argv[2])\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(new & set(sys.argv[3:])), 'numpy' in new, sep=',')"
    )
    command = [sys.executable, "-c", program, str(ROOT), package, *COSTLY]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip().lstrip(",") == "True", f"import {package} loads {result.stdout.strip()}"
