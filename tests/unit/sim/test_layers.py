"""The layers of `sim`: a module imports from its own layer and those above it in `LAYERS`, and no policy another."""

import ast
from pathlib import Path

import pytest

import sim
from sim.policies import POLICY_NAMES

FOLDER = Path(sim.__file__).parent
LAYERS = {
    "graphs and when things happen": "kinds graph timeline engine heaps loop fast steps",
    "what there is": "streams hardware precision routing placement rounding rates",
    "what is asked for, and what it costs": "world machine cost blocks hops shadow",
    "schedules": "policies",
    "a simulation": "simulate",
    "what it says": "report explain what_if lanes trace charts plots",
    "many of them": "grid sweep pools figures",
    "beside measurements": "published validation",
}
LEVEL = {name: level for level, names in enumerate(LAYERS.values()) for name in names.split()}
FILES = [file for file in sorted(FOLDER.rglob("*.py")) if file != FOLDER / "__init__.py"]


def imported(file):
    """Dotted names of the modules of `sim` that a file imports, `simulate` or `policies.common`."""
    package = file.relative_to(FOLDER).parent.parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *filter(None, [node.module])]
            yield from [".".join(base)] if node.module else (".".join([*base, alias.name]) for alias in node.names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(FOLDER)))
def test_imports_go_up(file):
    level = LEVEL[file.relative_to(FOLDER).with_suffix("").parts[0]]
    names = {name.split(".")[0] for name in imported(file)}
    assert [name for name in sorted(names) if LEVEL[name] > level] == []


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_no_policy_uses_another(policy):
    names = {name.partition("policies.")[2] for name in imported(FOLDER / "policies" / f"{policy}.py")}
    assert not names & set(POLICY_NAMES)


def test_every_file_with_a_schedule_is_a_policy():
    files = (FOLDER / "policies").glob("[!_]*.py")
    assert {file.stem for file in files if "\ndef build(" in file.read_text(encoding="utf-8")} == set(POLICY_NAMES)
