"""`flashmoe run --backward` and `flashmoe plan --save` in this process: what they tell, and that what is wrong does not
pass."""

import json
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest

from flashmoe_numba import FlashMoE, cli
from flashmoe_numba.processes import launch
from reference import load_preset, make_plan, make_workload
from reference.layout import SAVES

TINY = ["run", "--preset", "laptop-tiny", "--backend", "fibers", "--ranks", "2", "--tokens", "4", "--iterations", "1"]
CONFIG = load_preset("laptop-tiny", num_ranks=2, num_tokens=4)


pytestmark = pytest.mark.usefixtures("outside_mpirun")


def run_json(capsys, *flags):
    code = cli.main([*TINY, "--backward", "--json", "-", *flags])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("save", SAVES)
def test_backwards_are_timed_beside_their_forwards_and_checked(capsys, save):
    code, report = run_json(capsys, "--save", save, "--iterations", "2")
    found = report["backward"]
    assert (code, report["save"], report["failures"], report["bitwise_repeatable"]) == (0, save, [], True)
    for name in ("forward_ms", "backward_ms"):
        assert 0 < found[name]["min"] <= found[name]["median"] <= found[name]["max"]
    assert found["tokens_per_s"] == pytest.approx(
        8e3 / (found["forward_ms"]["median"] + found["backward_ms"]["median"])
    )
    flops = 2 * report["sent_rows"] * 2 * 16 * 24 * 3
    assert found["gflops"] == pytest.approx(flops / found["backward_ms"]["median"] / 1e6)
    assert found["kept_bytes"] == make_plan(CONFIG, save=save).backward.kept_total_bytes  # all rows, wherever they went
    assert found["error_shares"].keys() == {
        *("x", "topk_weights", "logits", "router", "gate_proj", "up_proj", "down_proj"),
    }
    assert all(0 < share <= 1 for share in found["error_shares"].values())


@pytest.mark.parametrize("flags", [
    ["--workload", "hot", "--dtype", "bfloat16"],
    ["--no-gated", "--activation", "relu", "--capacity", "1", "--processors", "2"],
    ["--shared-ffn", "5", "--shared-gate", "--dtype", "float16", "--packing", "none"],
    ["--num-zero", "2", "--dtype", "float64", "--ranks", "1"],
])  # fmt: skip
def test_gradients_of_other_layers_pass(capsys, flags):
    code, report = run_json(capsys, *flags)
    assert (code, report["failures"]) == (0, [])


def test_a_routing_from_outside_has_no_gradients_of_logits(capsys, tmp_path):
    """Some pairs choose nothing."""
    made = make_workload("uniform", CONFIG)
    idx, weights = np.tile([3, 1], (8, 1)), np.full((8, 2), 0.5)
    idx[:3] = [[-1, 2], [8, 8], [5, -1]]
    np.savez(tmp_path / "recorded.npz", x=np.concatenate(made.x), topk_idx=idx, topk_weights=weights)
    code, report = run_json(capsys, "--workload", str(tmp_path / "recorded.npz"))
    assert (code, report["failures"]) == (0, [])
    assert "logits" not in report["backward"]["error_shares"]


def test_the_table_tells_of_backwards_only_where_there_are_any(capsys):
    words = (
        "where it keeps, ",
        "bytes kept, saving rows",
        "of the call that keeps nothing",
        "of its bound is the largest",
    )
    assert cli.main([*TINY, "--backward", "--save", "rows"]) == 0
    out = capsys.readouterr().out
    assert all(text in out for text in words) and "passed" in out
    assert cli.main([*TINY, "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["save"], report["backward"]) == (None, None)


def test_trace_and_picture_are_of_the_last_backward(tmp_path):
    files = {flag: tmp_path / flag for flag in ("trace", "plot")}
    flags = [str(part) for flag, file in files.items() for part in (f"--{flag}", file)]
    assert cli.main([*TINY, "--backward", "--shared-ffn", "5", *flags]) == 0
    events = json.loads(files["trace"].read_text())["traceEvents"]
    slices = Counter(event["name"] for event in events if event["ph"] == "X")
    assert slices["GATE"] == 2 and slices["ROUTER_WEIGHTS"] == 2, "one of each rank"
    assert slices["SHARED_WEIGHTS"] == 2 * 2 and slices["WEIGHTS"] >= 2 and slices["WEIGHTS"] % 2 == 0, "up and down"
    assert files["plot"].read_bytes().startswith(b"\x89PNG")


def spoil(monkeypatch, change):
    """Have the layer's backwards return what `change(gradients, call number)` has left of them."""
    backward, calls = FlashMoE.backward, []

    def spoiled(self, *arguments, **more):
        found = backward(self, *arguments, **more)
        calls.append(None)
        change(found, len(calls))
        return found

    monkeypatch.setattr(FlashMoE, "backward", spoiled)


def arrays_of_rank_1(gradients):
    """By name."""
    arrays = {name: array for name, array in vars(gradients.weights[1]).items() if isinstance(array, np.ndarray)}
    return arrays | {name: getattr(gradients, name)[1] for name in ("x", "topk_weights", "logits")}


@pytest.mark.parametrize(("name", "wrong"), [
    *((name, 1.0001) for name in ("x", "topk_weights", "logits", "router", "gate_proj", "up_proj", "down_proj")),
    *((name, 1.0001) for name in ("shared_up_proj", "shared_down_proj", "shared_gate_weight")),
    *(("x", np.nan), ("router", np.inf)),
])  # fmt: skip
def test_a_wrong_gradient_does_not_pass(capsys, monkeypatch, name, wrong):
    """One element of one rank, the largest, times a number."""

    def change(gradients, _):
        array = arrays_of_rank_1(gradients)[name]
        array[np.unravel_index(np.argmax(np.abs(array)), array.shape)] *= wrong

    spoil(monkeypatch, change)
    code, report = run_json(capsys, "--shared-ffn", "5", "--shared-gate")
    assert (code, report["passed"]) == (1, False)
    assert any(failure.startswith(f"the gradient of {name} may be off") for failure in report["failures"])
    share = report["backward"]["error_shares"][name]
    assert share is None or share > 1


def test_other_bits_of_the_last_backward_do_not_pass(capsys, monkeypatch):
    def change(gradients, number):
        if number == 3:
            array = gradients.weights[0].router
            array[0, 0] = np.nextafter(array[0, 0], np.float32(9))

    spoil(monkeypatch, change)
    code, report = run_json(capsys, "--iterations", "2")
    assert (code, report["failures"]) == (1, ["the backwards gave different bits for the same input"])
    assert report["bitwise_repeatable"] is False


@pytest.mark.parametrize(("flags", "message"), [
    (["--save", "rows"], "argument --save: goes with --backward, got rows without"),
    (["--backward", "--save", "all"], "argument --save: invalid choice: 'all'"),
])  # fmt: skip
def test_bad_flags_are_one_line_and_start_nothing(capsys, monkeypatch, flags, message):
    monkeypatch.setattr(launch, "start", lambda *_: pytest.fail("mpirun was started"))
    assert cli.main(["run", *flags]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"flashmoe run: error: {message}")


def test_experts_with_a_norm_have_gradients(capsys, tmp_path):
    sizes = dict(moe_hidden_size=8, moe_intermediate_size=4, num_local_experts=4, num_experts_per_tok=2)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "muse_spark_text", "hidden_act": "silu"} | sizes))
    flags = ["--backend", "fibers", "--ranks", "2", "--tokens", "5", "--iterations", "1", "--backward", "--json", "-"]
    assert cli.main(["run", "--model-config", str(file), *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["failures"] == [] and 0 < report["backward"]["error_shares"]["result_scale"] <= 1


@pytest.mark.parametrize("save", SAVES)
def test_plan_tells_what_backwards_need(capsys, save):
    flags = ["plan", "--preset", "mixtral-8x7b", "--ranks", "4", "--save", save]
    assert cli.main([*flags, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    config = load_preset("mixtral-8x7b", num_ranks=4)
    plan = make_plan(config, save=save)
    assert found["backward"] == asdict(plan.backward) and found["total_bytes"] == plan.total_bytes
    without = make_plan(config)
    more = plan.segment_total_bytes - without.segment_total_bytes + plan.backward.fixed_bytes
    assert plan.total_bytes - without.total_bytes == 4 * more + plan.backward.kept_total_bytes
    assert cli.main(flags) == 0
    out = capsys.readouterr().out
    assert f"iB, saving {save}\n" in out and ("segment: again" in out) == (save == "nothing")
    assert f"  of a backward             {plan.backward.max_tasks:,}\n" in out


def test_plan_refuses_other_words(capsys):
    assert cli.main(["plan", "--save", "all"]) == 2
    assert "argument --save: invalid choice: 'all'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="save must be one of rows"):
        make_plan(CONFIG, save="all")


def test_a_backward_s_memory_is_counted_before_anything_is_made(capsys, monkeypatch):
    """Weights a second time, gradients twice in the type of sums, what a call keeps, dy and dx."""
    plan = make_plan(CONFIG, save="rows")
    rows = 2 * 2 * CONFIG.num_tokens * CONFIG.hidden * 4
    forward = 2 * plan.weight_bytes + rows
    backward = forward + 2 * (plan.weight_bytes + 2 * plan.weight_bytes) + plan.backward.kept_total_bytes + rows
    for num_bytes, flags, expected in (
        (forward, [], 0), (forward, ["--backward", "--save", "rows"], 2),
        (backward - 1, ["--backward", "--save", "rows"], 2), (backward, ["--backward", "--save", "rows"], 0),
    ):  # fmt: skip
        monkeypatch.setattr("os.sysconf", lambda name, size=num_bytes: {"SC_PHYS_PAGES": size, "SC_PAGE_SIZE": 1}[name])
        assert cli.main([*TINY, *flags]) == expected, f"{num_bytes} bytes, {flags}"
        if expected:
            assert "the weights and tokens, and the backwards, of 2 ranks need" in capsys.readouterr().err
