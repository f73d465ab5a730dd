"""`flashmoe run --checkpoint` and `--model-config`: a published layer is run and checked; wrong ones are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from published import BLOCKS, E, F, H, make_folder, truth

from flashmoe_numba import cli
from flashmoe_numba.bench import measure
from reference import RouterKind, families

pytestmark = pytest.mark.usefixtures("outside_mpirun")


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "c", "qwen3_moe", dtype="bfloat16", norm_topk_prob=True)


def test_a_published_layer_is_run_and_checked(folder, capsys, monkeypatch):
    seen, make_weights = [], measure.make_weights
    monkeypatch.setattr(measure, "make_weights", lambda *asked: seen.append(make_weights(*asked)) or seen[-1])
    flags = ["--layer", "3", "--ranks", "2", "--threads", "--tokens", "9", "--iterations", "1", "--json", "-"]
    assert cli.main(["run", "--checkpoint", str(folder), *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] and (report["checkpoint"], report["layer"]) == (str(folder), 3)
    config = report["config"]
    assert [config[name] for name in ("hidden", "ffn", "num_experts", "dtype", "num_tokens")] == [
        H,
        F,
        E,
        "bfloat16",
        9,
    ]
    assert RouterKind(**config["router"]) == RouterKind(renormalize=True)
    assert np.array_equal(seen[0].down_proj, truth("qwen3_moe", 3, "bfloat16")["down_proj"])


@pytest.mark.parametrize(("flags", "message"), [
    (["--layer", "1"], "argument --checkpoint: layer must be one with experts, got 1: layers with experts are 2 to"),
    (["--layer", "3", "--ffn", "12"], "must have shape [21, 12], got [21, 11]"),
    (["--layer", "3", "--ranks", "3"], "--experts must be a multiple of --ranks=3, got 8"),
    (["--layer", "3", "--preset", "laptop-text"], "argument --preset/--model: not allowed with argument --checkpoint"),
    (["--layer", "3", "--model-config", "x"], "argument --model-config: not allowed with argument --checkpoint"),
    (["--layer", "-1"], "argument --layer: must be an integer >= 0, got '-1'"),
])  # fmt: skip
def test_a_wrong_layer_is_refused_before_anything_runs(folder, capsys, flags, message):
    assert cli.main(["run", "--checkpoint", str(folder), *flags]) == 2
    assert message in capsys.readouterr().err


def test_shapes_from_a_config_alone(folder, capsys):
    path = str(folder / "config.json")
    assert cli.main(["plan", "--model-config", path, "--ranks", "4", "--tokens", "33", "--json", "-"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["preset"] == path
    sizes = [plan["config"][name] for name in ("hidden", "ffn", "num_experts", "num_topk", "num_ranks", "num_tokens")]
    assert sizes == [H, F, E, BLOCKS["qwen3_moe"][1]["num_experts_per_tok"], 4, 33]
    assert cli.main(["sim", "--model-config", path, "--tokens", "33", "--json", "-"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert report["preset"] == path and report["layer"]["hidden"] == H and report["ranks"] == 8


@pytest.mark.parametrize(("text", "message"), [
    ("{", "must be JSON"),
    ('{"model_type": "my_moe"}', "model_type must be of a known family, got my_moe"),
    ('{"model_type": "qwen3_moe"}', "config of model_type 'qwen3_moe' must have hidden_size"),
])  # fmt: skip
def test_a_wrong_config_is_refused(tmp_path, capsys, text, message):
    (tmp_path / "config.json").write_text(text)
    for command in ("plan", "sim", "run"):
        assert cli.main([command, "--model-config", str(tmp_path / "config.json")]) == 2
        error = capsys.readouterr().err
        assert "argument --model-config: " in error and message in error


def test_a_router_with_sigmoid_scores_and_a_bias_is_run(tmp_path, capsys):
    folder = make_folder(tmp_path / "c", "minimax_m2")
    assert cli.main(["run", "--checkpoint", str(folder), "--layer", "3", "--backend", "fibers", "--tokens", "5"]) == 0
    assert "passed" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "message"), [
    (["run", "--layer", "7"], "argument --layer: goes with --model-config or --checkpoint, got 7 without"),
    (["run", "--layer", "0"], "argument --layer: goes with --model-config or --checkpoint, got 0 without"),
    (["plan", "--layer", "7"], "argument --layer: goes with --model-config, got 7 without"),
    (["plan", "--model-config", ""], "argument --model-config: .: must be a JSON file, got a folder"),
    (["sim", "--family", "mixtral"], "argument --family: goes with --model-config, got 'mixtral' without"),
])  # fmt: skip
def test_flags_of_a_model_without_one_are_refused(capsys, flags, message):
    assert cli.main(flags) == 2
    assert message in capsys.readouterr().err


def test_a_family_of_ones_own_is_run(tmp_path, capsys):
    """The public file with another model_type: nothing finds it but the flag."""
    folder = make_folder(tmp_path / "c", "qwen3_moe", model_type="my_moe")
    family = tmp_path / "my.toml"
    text = Path(families.__file__).with_name("qwen3_moe.toml").read_text()
    family.write_text(text.replace('model_type = "qwen3_moe"', 'model_type = "my_moe"'))
    flags = ["--layer", "3", "--tokens", "5"]
    run = ["run", "--checkpoint", str(folder), *flags, "--backend", "fibers"]
    assert cli.main(run) == 2
    assert "model_type must be of a known family, got my_moe" in capsys.readouterr().err
    assert cli.main([*run, "--family", str(family), "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] and report["config"]["hidden"] == H
    plan = ["plan", "--model-config", str(folder / "config.json"), *flags]
    assert cli.main([*plan, "--family", str(family)]) == 0
    capsys.readouterr()
    for command in (run, plan):
        assert cli.main([*command, "--family", "my_moe"]) == 2
        assert "argument --family: family must be one of" in capsys.readouterr().err
        assert cli.main([*command, "--family", str(tmp_path / "no.toml")]) == 2
        assert "argument --family: family must be a file, got" in capsys.readouterr().err


def test_a_folder_is_no_config(folder, capsys):
    assert cli.main(["plan", "--model-config", str(folder)]) == 2
    assert f"argument --model-config: {folder}: must be a JSON file, got a folder" in capsys.readouterr().err
