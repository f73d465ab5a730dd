"""One module of the kernel knows how a peer's memory is reached; all others act by its verbs."""

import ast

import pytest

from flashmoe_numba.device.compilation import PACKAGE

OFFSETS = {"dispatch_at", "result_at", "dispatch_flag_at", "result_flag_at", "control_at", "again_at", "factors_at"}
ADDRESSES = {"address", "array_at", "dots_at", "stage_at"} | OFFSETS


def sees(source):
    """What of a peer's memory a module names."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    names |= {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    return names & ADDRESSES


def test_no_module_but_peers_sees_an_address():
    modules = {file.name: sees(file.read_text(encoding="utf-8")) for file in (PACKAGE / "kernel").glob("*.py")}
    declared = modules.pop("state.py")
    assert declared == ADDRESSES - {"array_at"}
    assert modules.pop("peers.py") == ADDRESSES - {"stage_at"}
    assert modules.pop("wire.py") == {"stage_at"}, "where rows lie that a put brings"
    assert modules.pop("network.py") <= ADDRESSES, "it stands for what carries puts, and is in no kernel"
    assert {name: seen for name, seen in modules.items() if seen} == {}


@pytest.mark.parametrize(
    "source",
    [
        "from flashmoe_numba.device import array_at",
        "def f(segments):\n    return segments.address[1]",
        "def f(p, segments):\n    return of_peer(segments, 1, p.result_at, segments.result)",
    ],
)
def test_an_address_is_seen(source):
    assert sees(source)
