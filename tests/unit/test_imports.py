"""The import rule: `reference <- sim`, `reference <- flashmoe_numba`; only the commands of `cli.py` see both.

Inside a package imports go down its floors only (tests/floors.py), and never round in a circle.
"""

import graphlib
import shutil
import sys
from pathlib import Path

import pytest
from children import printed
from floors import FLOORS, ROOT, arrows, imported_names, upward

OURS = {"reference", "sim", "flashmoe_numba", "experiments", "tests"}
MAY_IMPORT = {"reference": set(), "sim": {"reference"}, "flashmoe_numba": {"reference"}}
SEES_ALL = (Path("flashmoe_numba/cli.py"), Path("flashmoe_numba/commands"))
MOST_ENTRIES = {"sim": 12, "flashmoe_numba": 20}
INSIDE = {"reference": "layer", "sim": "simulation"}  # what an import of the package must bring
CUDA = ("numba.cuda", "numba_cuda", "numba_cuda_mlir")


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


@pytest.mark.parametrize("folder", FLOORS)
def test_imports_go_down_only(folder):
    assert upward(ROOT, folder) == []


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_make_no_circle(package):
    graphlib.TopologicalSorter(arrows(ROOT, package)).prepare()


@pytest.mark.parametrize("package", MOST_ENTRIES)
def test_a_stranger_sees_all_rooms_at_once(package):
    entries = [entry.name for entry in (ROOT / package).iterdir() if entry.name != "__pycache__"]
    assert len(entries) <= MOST_ENTRIES[package], sorted(entries)


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
    ("folder", "path", "source", "wrong"),
    [
        ("sim", "sim/world/planted.py", "from ..engine import graph", "sim.world.planted imports sim.engine.graph"),
        ("sim", "sim/engine/planted.py", "import sim.reading.report", "sim.engine.planted imports sim.reading.report"),
        ("sim", "sim/engine/planted.py", "from sim import simulation", "sim.engine.planted imports sim.simulation"),
        ("sim", "sim/attic/planted.py", "from ..world import world", "sim.attic.planted imports sim.world.world"),
        (
            "flashmoe_numba",
            "flashmoe_numba/kernel/planted.py",
            "def f():\n    from ..heap.rank import Rank",
            "flashmoe_numba.kernel.planted imports flashmoe_numba.heap.rank",
        ),
        (
            "flashmoe_numba/explore",
            "flashmoe_numba/explore/run/planted.py",
            "if TYPE_CHECKING:\n    from ..tell.shrink import shrink",
            "flashmoe_numba.explore.run.planted imports flashmoe_numba.explore.tell.shrink",
        ),
    ],
)
def test_finds_a_planted_import_upward(copy, folder, path, source, wrong):
    plant(copy, path, source)
    assert upward(copy, folder) == [wrong]


def test_finds_a_planted_circle(copy):
    plant(copy, "sim/world/planted_a.py", "from . import planted_b")
    plant(copy, "sim/world/planted_b.py", "from .planted_a import f")
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(arrows(copy, "sim")).prepare()


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


@pytest.mark.parametrize("package", INSIDE)
def test_import_loads_numpy_and_the_standard_library_only(package):
    program = f"import sys, numpy; before = set(sys.modules); import {package}; print(*set(sys.modules) - before)"
    modules = printed("-c", program).split()
    foreign = {name.partition(".")[0] for name in modules} - sys.stdlib_module_names - {"numpy", "reference", package}
    assert f"{package}.{INSIDE[package]}" in modules and not foreign
