"""What is handed on: the version, a source distribution with all that a developer needs, packages and nothing else."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import flashmoe_numba
from flashmoe_numba import cli
from flashmoe_numba.commands import version

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("reference", "sim", "flashmoe_numba")
FOLDERS = (*PACKAGES, "tests", "docs", "experiments", ".ci")
NOT_HANDED_ON = ("results", "__pycache__")
BUILD = """
import sys, setuptools, setuptools.build_meta
setuptools.build_meta.build_sdist("dist")
sys.argv = ["setup.py"]
setuptools.setup(script_args=["build_py", "--build-lib", "packages"])
"""


def files_in(folder):
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def written_version():
    return re.search(r"^version = (.+)$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A copy of the project in which both kinds of distribution were built: dist/*.tar.gz, and packages/ of a wheel."""
    copy = tmp_path_factory.mktemp("project")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, copy)
    for folder in ("sim", "tests", "experiments/lost"):  # what running leaves behind
        (copy / folder / "__pycache__").mkdir()
        (copy / folder / "__pycache__" / "left.cpython-311.pyc").touch()
    subprocess.run([sys.executable, "-c", BUILD], cwd=copy, check=True, capture_output=True)
    return copy


def test_a_source_distribution_has_tests_docs_and_all_else_but_results(built):
    (archive,) = (built / "dist").iterdir()
    assert archive.name in {f"{name}-{written_version()}.tar.gz" for name in ("flashmoe-numba", "flashmoe_numba")}
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in (member.name for member in tar if member.isfile())}
    made = {name for name in packed if name.startswith("flashmoe_numba.egg-info/")} | {"PKG-INFO"}
    needed = {f"{folder}/{file}" for folder in FOLDERS for file in files_in(ROOT / folder)}
    needed = {file for file in needed if not any(part in file.split("/") for part in NOT_HANDED_ON)}
    needed |= {"setup.cfg", "pyproject.toml", "MANIFEST.in", "Makefile", "README.md", "CHANGES.md", "LICENSE"}
    assert packed - made == needed
    assert {"tests/conftest.py", "docs/protocol.md", ".ci/run", "experiments/lost/faults.py"} <= needed


def test_a_wheel_has_the_packages_with_their_data_and_no_tests(built):
    assert {folder.name for folder in (built / "packages").iterdir()} == set(PACKAGES)
    sources = {f"{folder}/{file}" for folder in PACKAGES for file in files_in(ROOT / folder)}
    assert files_in(built / "packages") == {file for file in sources if "__pycache__" not in file}
    assert {
        "reference/presets/laptop-tiny.toml",
        "sim/drafting/rates.toml",
        "sim/drafting/trust.toml",
        "sim/reading/page/page.html",
        "flashmoe_numba/explore/plants.toml",
    } <= sources


def test_the_version_is_that_of_the_checkout_whatever_is_installed(capsys, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "7.7")
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert (left.value.code, capsys.readouterr().out) == (0, f"flashmoe {written_version()}\n")
    assert flashmoe_numba.__version__ == written_version()


@pytest.mark.parametrize("beside", [None, "[metadata]\nname = other\nversion = 3.0\n", "[options]\npackages = find:\n"])
def test_the_version_of_an_installed_package_is_that_of_its_metadata(tmp_path, monkeypatch, beside):
    monkeypatch.setattr(version, "SETUP", tmp_path / "setup.cfg")
    if beside:
        (tmp_path / "setup.cfg").write_text(beside)
    monkeypatch.setattr(importlib.metadata, "version", {"flashmoe-numba": "7.7"}.__getitem__)
    assert version.version() == "7.7"
