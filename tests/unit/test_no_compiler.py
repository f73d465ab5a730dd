"""NUMBA_DISABLE_JIT=1, which people leave set after a session with a debugger."""

import json
from pathlib import Path

import pytest
from children import printed

from flashmoe_numba.commands.doctor import host
from flashmoe_numba.commands.doctor.host import NO, OK, WARN

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def facts():
    return json.loads(printed(HERE / "no_compiler.py", NUMBA_DISABLE_JIT="1"))


def test_fibers_need_no_compiler(facts):
    assert facts["layer_error"] < 1e-6


def test_compiled_backends_say_why_they_cannot_be(facts):
    sentence = (
        "backend '{}' cannot compile its kernel, because NUMBA_DISABLE_JIT is set: "
        'unset it, or use backend="fibers", which needs no compiler'
    )
    assert facts["refusals"] == {name: sentence.format(name) for name in ("cpu", "cuda")}
    status, err = facts["run"]
    assert (status, err) == (2, f"flashmoe run: error: argument --backend: {sentence.format('cpu')}\n")


def test_simulations_run_by_the_plain_engine(facts):
    same, num_runs, warnings = facts["simulations"]
    assert same
    assert num_runs[0] > 0
    assert num_runs[1] == 0
    sentence = "NUMBA_DISABLE_JIT is set: simulations are not compiled, and take far longer"
    assert warnings == [sentence]
    assert facts["sim"] == [0, f"flashmoe sim: warning: {sentence}\n"]


def test_doctor_says_so(facts):
    status, found, fix = facts["doctor"]
    assert (status, fix) == (NO, 'unset it, or use backend="fibers"')
    assert found.startswith("NUMBA_DISABLE_JIT is set: nothing is compiled")


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        ("NUMBA_OPT", "0", WARN),
        ("NUMBA_OPT", "3", OK),
        ("NUMBA_DEBUGINFO", "1", WARN),
        ("NUMBA_BOUNDSCHECK", "1", WARN),
        ("NUMBA_BOUNDSCHECK", "0", OK),
    ],
)
def test_doctor_names_settings_that_make_code_slow(monkeypatch, name, value, status):
    for other in host.SLOW:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    check = host.check_compiler()
    assert check.status == status
    assert (f"{name}={value}" in check.found) == (status == WARN)
