"""`flashmoe check` as it is called: what it prints and writes, and that a target can do it no harm."""

import json

import numpy as np
import planted_layers
import pytest
from cases import assert_same_bits
from children import ROOT, printed, run_python

from flashmoe_numba import cli
from flashmoe_numba.commands import check
from flashmoe_numba.commands.check.inputs import Case, Kind, make_inputs
from flashmoe_numba.commands.check.properties import PROPERTIES
from flashmoe_numba.commands.check.saved import Saved
from flashmoe_numba.commands.check.subject import Subject, TimeLimit
from flashmoe_numba.commands.check.target import Target, TargetError

FILE = planted_layers.__file__
SIZES = dict(hidden=5, ffn=3, num_experts=4, num_topk=2, seed=0)
pytestmark = pytest.mark.usefixtures("outside_mpirun")


def target(name):
    return Target(f"{planted_layers.FILE}:{name}", False, planted_layers.FOLDER)


def run(name, *flags):
    return cli.main(["check", f"{FILE}:{name}", *flags])


def test_a_layer_that_is_right_passes_and_prints_nothing_to_stdout(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("prints", "--examples", "2", "--only", "oracle,batch,padding", "--json", "-") == 0
    out, err = capfd.readouterr()
    report = json.loads(out)
    assert report["passed"] and "a word of the target's" in err
    found = [(each["name"], each["verdict"], each["cases"]) for each in report["properties"]]
    assert found == [("oracle", "holds", 2), ("padding", "holds", 2), ("batch", "holds", 2)]
    assert 0 < report["properties"][0]["deviation"] < report["properties"][0]["tolerance"]
    assert list(tmp_path.iterdir()) == [], "nothing failed, so there is nothing to write"


def test_what_fails_is_told_and_can_be_called_again(capsys, tmp_path):
    folder = tmp_path / "failed"
    flags = ["--only", "oracle,one-token", "--save", str(folder), "--dtype", "float32"]
    assert run("last_row_dropped", *flags) == 1
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in out if line.startswith(("oracle ", "one-token "))][:2] == [
        ["oracle", "FAILS"],
        ["one-token", "FAILS"],
    ]
    assert "    with 1 tokens, hidden 1, ffn 1, top 1 of 1 experts, seed " in "\n".join(out)
    assert out[-1] == "of 2 properties 0 hold, 2 fail"
    script = folder / "oracle.py"
    assert f"    again: python {script}" in out
    told = next(line for line in out if line.startswith("oracle fails: "))
    assert printed(script).strip() == told, "the same finding, in a process of the script's own"


def test_a_case_comes_back_from_its_file(tmp_path):
    """In bfloat16 and with biases, which NumPy's files do not know or which are often not there."""
    kind = Kind(dtype="bfloat16", bias=True)
    inputs = make_inputs(Case(num_tokens=3, **SIZES), kind)
    saved = Saved(target("layer"), PROPERTIES[0], inputs)
    saved.save(tmp_path, 'a "story" with \\ and """')
    again = Saved.load(tmp_path / "oracle.npz")
    assert (again.target, again.asked, again.inputs.config) == (saved.target, saved.asked, inputs.config)
    assert_same_bits(list(again.inputs.call()[:3]), list(inputs.call()[:3]))
    for name in ("router", "up_proj", "gate_proj", "down_proj", "up_bias", "gate_bias", "down_bias"):
        assert_same_bits(getattr(again.inputs.weights, name), getattr(inputs.weights, name), name)
    compile((tmp_path / "oracle.py").read_text(), "oracle.py", "exec")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("layer", "must be package.module:name or path/file.py:name, got 'layer'"),
        (f"{FILE}:", f"must be package.module:name or path/file.py:name, got '{FILE}:'"),
        (f"{FILE}:lager", f"'{FILE}' has no 'lager'"),
        ("no_such_module:layer", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("/no/such/file.py:layer", "FileNotFoundError: "),
        (f"{FILE}:NO_FUNCTION", "must take (x, topk_idx, topk_weights, weights), or (weights) and return what takes"),
        (f"{FILE}:takes_two", "must take (x, topk_idx, topk_weights, weights), or (weights) and return what takes"),
    ],
)
def test_a_target_that_is_none_is_an_error_of_one_line(capsys, target, message):
    assert cli.main(["check", target]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"flashmoe check: error: argument TARGET: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only", "batch,speed"], "argument --only: must be of oracle, "),
        (["--only", "batch", "--skip", "batch"], "argument --skip: no property is left"),
        (["--multiple", "131"], "argument --multiple: must be at most 130, got 131"),
        (["--limit-s", "0"], "argument --limit-s: must be a number in (0, 86400], got '0'"),
        (["--examples", "0"], "argument --examples: must be an integer >= 1, got '0'"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--json", "/proc/none/x.json"], "argument --json: cannot write '/proc/none/x.json'"),
        (["--save", f"{FILE}/x"], f"argument --save: cannot write '{FILE}/x': '{FILE}' is no folder to write to"),
    ],
)
def test_bad_flags_are_one_line_and_load_nothing(capsys, monkeypatch, flags, message):
    monkeypatch.setattr(Subject, "load", lambda *_: pytest.fail("the target was loaded"))
    assert run("layer", *flags) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"flashmoe check: error: {message}")


def test_torch_is_asked_for_before_anything_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda _: None)
    assert run("layer", "--torch") == 2
    assert "argument --torch: needs PyTorch" in capsys.readouterr().err


def test_no_answer_to_a_first_call_fails_all_at_once(capsys, monkeypatch, tmp_path):
    def hang(*_):
        raise TimeLimit("no answer within 300 s")

    monkeypatch.setattr(Subject, "warm_up", hang)
    monkeypatch.setattr(check, "look", lambda *_: pytest.fail("it would only take longer"))
    assert run("layer", "--only", "oracle,no-tokens", "--save", str(tmp_path)) == 1
    out = capsys.readouterr().out.splitlines()
    assert "oracle and 1 more fail: no answer within 300 s, to the first call of all: a target that" in "\n".join(out)
    assert out[-1] == "of 2 properties 0 hold, 2 fail"


def test_ctrl_c_leaves_what_is_known(capsys, monkeypatch, tmp_path):
    def look(result, kind, run, examples, seed):
        if result.asked.name == "one-token":
            raise KeyboardInterrupt
        usual(result, kind, run, examples, seed)

    usual = check.look
    monkeypatch.setattr(check, "look", look)
    assert run("layer", "--examples", "1", "--only", "oracle,one-token,batch", "--json", str(tmp_path / "x")) == 130
    out, err = capsys.readouterr()
    verdicts = [each["verdict"] for each in json.loads((tmp_path / "x").read_text())["properties"]]
    assert verdicts == ["holds", "interrupted", "interrupted"]
    assert out.endswith("of 3 properties 1 hold, 2 not done\n")
    assert err.endswith("flashmoe check: interrupted\n")


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [("hangs", TimeLimit, "no answer within 3 s"), ("dies", TargetError, "its process died")],
)
def test_a_process_that_is_lost_is_begun_again(name, kind, message):
    small, large = (make_inputs(Case(num_tokens=n, **SIZES), Kind()) for n in (2, 9))
    with Subject(target(name), limit_s=3) as subject:
        for _ in range(2):
            with pytest.raises(kind, match=message):
                subject.run(large.weights, [large.call()])
        (answer,) = subject.run(small.weights, [small.call()])
    np.testing.assert_allclose(answer.y, small.expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [("raises", r"RuntimeError: no such kernel \(planted_layers.py:\d+\)"), ("leaves", r"SystemExit: 0 \(planted_")],
)
def test_an_exception_is_told_with_its_place(name, message):
    inputs = make_inputs(Case(num_tokens=2, **SIZES), Kind())
    with (
        Subject(target(name), limit_s=60) as subject,
        pytest.raises(TargetError, match=message),
    ):
        subject.run(inputs.weights, [inputs.call()])


def test_a_module_is_found_in_the_folder_where_one_is(tmp_path):
    (tmp_path / "my_layers.py").write_text("def layer(x, topk_idx, topk_weights, weights):\n    return x\n")
    program = "import sys; from flashmoe_numba.cli import main; sys.exit(main(sys.argv[1:]))"
    flags = ["my_layers:layer", "--only", "no-tokens", "--examples", "1"]
    done = run_python("-c", f"import os; os.chdir({str(tmp_path)!r}); {program}", "check", *flags)
    assert done.returncode == 0, done.stderr
    assert (ROOT / "flashmoe_numba").exists() and not (tmp_path / "flashmoe-check").exists()


def test_no_folder_is_made_for_flags_that_are_wrong(capsys, tmp_path):
    report = tmp_path / "new" / "x.json"
    for wrong in (["--save", FILE], ["--only", "padding", "--skip", "padding"], ["--multiple", "999999"]):
        assert run("prints", *wrong, "--json", str(report)) == 2
    assert not report.parent.exists()
    assert run("prints", "--examples", "1", "--only", "oracle", "--json", str(report)) == 0
    assert f"flashmoe: --json: made the folder {str(report.parent)!r}" in capsys.readouterr().err
    assert report.exists()
