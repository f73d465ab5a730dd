"""A step of a whole model: sizes against published totals, times against sums by hand, and what is refused."""

import json

import pytest

import sim
from flashmoe_numba import cli
from reference import load_preset, preset_names, read_preset
from sim.studies.whole_model import model_step
from sim.world.model_shape import read_shape

# Parameters in billions as published (Llama 4's of the language model alone), and of those the shared experts, which
# the presets leave out.
PUBLISHED = {
    "deepseek-v3": (671.0, 58 * 3 * 7168 * 2048 / 1e9),
    "qwen3-30b-a3b": (30.5, 0),
    "mixtral-8x7b": (46.7, 0),
    "olmoe-1b-7b": (6.9, 0),
    "gpt-oss-120b": (116.8, 0),
    "llama-4-scout": (107.8, 48 * 3 * 5120 * 8192 / 1e9),
}


def test_presets_with_sizes_of_a_model_are_those_of_public_models():
    assert {name for name in preset_names() if "model" in read_preset(name)} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_all_weights_are_as_many_as_published(name):
    shape, config = read_shape(read_preset(name)["model"]), load_preset(name)
    assert shape.hidden == config.hidden
    layers, dense = len(shape.dense), sum(shape.dense)
    experts = config.num_experts * config.hidden * (3 * config.ffn + 1)
    total = layers * shape.projection_weights + dense * 3 * shape.hidden * shape.dense_ffn
    total += (layers - dense) * experts + 2 * shape.vocab * shape.hidden
    published, shared = PUBLISHED[name]
    assert total / 1e9 + shared == pytest.approx(published, rel=0.005)


def test_deepseeks_cache_of_a_token_is_as_published():
    """70.272 KB in bfloat16 (arXiv 2505.09343, table 1)."""
    shape = read_shape(read_preset("deepseek-v3")["model"])
    assert len(shape.dense) * shape.cached * 2 == 70_272


MODEL = {
    "num_hidden_layers": 4,
    "hidden_size": 192,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "vocab_size": 997,
    "intermediate_size": 301,
}


def simulation(**sizes):
    config = load_preset("laptop-tiny", **({"hidden": 192, "num_ranks": 2, "num_tokens": 37} | sizes))
    scenario = sim.Scenario(config=config, hardware="2xH100", precision="bfloat16")
    return sim.simulate("bulk", scenario.make())


def roof_us(operations, nbytes):
    return max(operations / 989.4e12, nbytes / (3350e9 * 0.9)) * 1e6


@pytest.mark.parametrize(("context", "tokens"), [(1, 37), (5000, 37), (3, 20_000)])
def test_times_are_those_by_hand(context, tokens):
    """Two windows, one dense layer; attention counted head by head."""
    model = MODEL | {
        "first_k_dense_replace": 1, "sliding_window": 128,
        "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
    }  # fmt: skip
    run = simulation(gated=True, num_tokens=tokens)
    step = model_step(run, read_shape(model), context)
    matrices = [(192, 6 * 20), (192, 2 * 20), (192, 2 * 20), (6 * 20, 192)]
    weights = sum(rows * columns for rows, columns in matrices)
    assert step.projections_us == pytest.approx(4 * roof_us(2 * tokens * weights, 2 * weights))
    operations = nbytes = 0
    for most in (context, min(context, 128)) * 2:
        operations += 6 * tokens * (2 * most * 20 + 2 * most * 20)
        nbytes += 2 * tokens * 2 * (most * 20 + most * 20)
    assert step.attention_us == pytest.approx(roof_us(operations, nbytes))
    assert step.dense_us == pytest.approx(roof_us(2 * tokens * 3 * 192 * 301, 2 * 3 * 192 * 301))
    assert step.head_us == pytest.approx(roof_us(2 * tokens * 192 * 997, 2 * 192 * 997))
    assert step.moe_us == pytest.approx(3 * run.latency_us)
    parts = step.projections_us + step.attention_us + step.dense_us + step.head_us + step.moe_us
    assert step.tpot_ms == pytest.approx(parts / 1000)
    assert step.tokens_per_s_per_gpu == pytest.approx(tokens / (parts / 1e6))
    assert (step.layers, step.moe_layers, step.context, step.basis) == (4, 3, context, "roofline + simulation")


def test_latent_attention_by_hand():
    """Each head multiplies the latent row and its rotated part for scores, and the latent row again for values."""
    model = MODEL | {"q_lora_rank": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
                     "v_head_dim": 12}  # fmt: skip
    shape = read_shape(model)
    matrices = [(192, 48), (48, 6 * 24), (192, 32 + 8), (32, 6 * (16 + 12)), (6 * 12, 192)]
    assert shape.projection_weights == sum(rows * columns for rows, columns in matrices)
    assert (shape.cached, shape.key_and_value) == (40, 40 + 32)
    whole_queries = read_shape(model | {"q_lora_rank": None})
    assert whole_queries.projection_weights == shape.projection_weights - 192 * 48 - 48 * 144 + 192 * 144


@pytest.mark.parametrize(("more", "dense"), [
    ({}, "0000"),
    ({"first_k_dense_replace": 3}, "1110"),
    ({"mlp_only_layers": [0, 2]}, "1010"),
    ({"mlp_only_layers": None, "decoder_sparse_step": 2}, "1010"),
    ({"interleave_moe_layer_step": 4}, "1110"),
    ({"moe_layer_freq": 2}, "0101"),
    ({"moe_layer_freq": [0, 1, 1, 0]}, "1001"),
])  # fmt: skip
def test_which_layers_are_dense(more, dense):
    assert read_shape(MODEL | more).dense == tuple(digit == "1" for digit in dense)
    assert read_shape(MODEL | more, 2).dense == tuple(digit == "1" for digit in dense[:2])


@pytest.mark.parametrize(("more", "message"), [
    ({"vocab_size": None}, "the model's config must have vocab_size"),
    ({"hidden_size": None}, "the model's config must have hidden_size or d_model"),
    ({"mamba_d_state": 16}, "layers that are no plain attention, by mamba_d_state of its config"),
    ({"layer_types": ["linear_attention"] * 4}, "layer_types must be of full_attention, .*'linear_attention' for lay"),
])  # fmt: skip
def test_models_that_are_not_modelled_are_refused(more, message):
    with pytest.raises(ValueError, match=message):
        read_shape(MODEL | more)


def test_the_number_of_layers_the_hidden_size_and_the_memory_are_checked():
    with pytest.raises(ValueError, match=r"layers must be in \[1, 4\], the layers of the model, got 5"):
        read_shape(MODEL, 5)
    with pytest.raises(ValueError, match="hidden must be the model's 200, got 192"):
        model_step(simulation(), read_shape(MODEL | {"hidden_size": 200}), 1)
    with pytest.raises(
        ValueError, match=r"4 layers need .* GB on the busiest rank \(experts 0.0, cache .* has 80: take"
    ):
        model_step(simulation(), read_shape(MODEL), 10**7)


FLAGS = ["sim", "--hardware", "8xH100", "--policy", "flashmoe,bulk"]
OLMOE = ["--model", "olmoe-1b-7b"]


def run_json(capsys, *flags, source=OLMOE):
    assert cli.main([*FLAGS, *source, "--json", "-", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_energy_and_money_are_of_the_layer_or_of_the_whole_step(capsys):
    flags = ["--watts", "700", "--dollars-per-gpu-hour", "2.5", "--tokens", "32"]
    for whole in ([], ["--layers", "all", "--context", "100"]):
        for row in run_json(capsys, *flags, *whole):
            seconds = row["model"]["tpot_ms"] / 1000 if whole else row["latency_us"] / 1e6
            assert row["energy_joules"] == pytest.approx(700 * 8 * seconds)
            assert row["joules_per_million_tokens"] == pytest.approx(row["energy_joules"] / (8 * 32) * 1e6)
            hours = 8 * seconds / 3600
            assert row["dollars_per_million_tokens"] == pytest.approx(2.5 * hours / (8 * 32) * 1e6)


def test_a_model_by_its_config_is_the_preset(tmp_path, capsys):
    config = {"model_type": "olmoe", "num_experts": 64, "num_experts_per_tok": 8, "intermediate_size": 1024}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | read_preset("olmoe-1b-7b")["model"]))
    flags = ["--tokens", "32", "--layers", "7", "--precision", "bfloat16"]
    preset = run_json(capsys, *flags)
    file = run_json(capsys, *flags, source=["--model-config", str(path)])
    assert [row["model"] for row in file] == [row["model"] for row in preset]
    assert {row["model"]["layers"] for row in file} == {7}


def test_the_table_has_the_columns_and_says_what_they_are(capsys):
    flags = ["--tokens", "32", "--layers", "all", "--watts", "700", "--dollars-per-gpu-hour", "2"]
    assert cli.main([*FLAGS, *OLMOE, *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(number for number, line in enumerate(lines) if "TPOT" in line)
    names, units, cells = lines[head : head + 3]
    assert names.split()[2:] == ["TPOT", "tokens", "energy", "energy", "cost"]
    assert units.split()[1:] == ["ms", "/s/GPU", "J", "J/Mtok", "$/Mtok"]
    (row, _) = run_json(capsys, *flags)
    assert cells.split()[2:4] == [
        f"{row['model']['tpot_ms']:.2f}", f"{row['model']['tokens_per_s_per_gpu']:,.0f}"
    ]  # fmt: skip
    energy = row["joules_per_million_tokens"]
    assert cells.split()[-2] == (f"{energy:,.0f}" if energy >= 1000 else f"{energy:.4g}")
    last = "\n".join(lines[head:])
    assert "roofline + simulation: 16 layers, 16 of them" in last and "a lower bound" in last


@pytest.mark.parametrize(("flags", "message"), [
    (["--layers", "0"], "argument --layers: must be an integer >= 1, got '0'"),
    (["--layers", "17"], "argument --layers: layers must be in [1, 16], the layers of the model, got 17"),
    (["--layers", "2", "--model", "laptop-text"], "argument --layers: the --preset laptop-text says no sizes of a "),
    (["--layers", "2", "--hidden", "256"], "argument --layers: --hidden must be the model's 2048, got 256"),
    (["--context", "9"], "argument --context: goes with --layers"),
    (["--layers", "2", "--context", "0"], "argument --context: must be an integer >= 1, got '0'"),
    (["--watts", "0"], "argument --watts: must be a positive number of at most 1e+09, got '0'"),
    (["--watts", "inf"], "argument --watts: must be a positive number of at most 1e+09, got 'inf'"),
    (["--dollars-per-gpu-hour", "two"], "argument --dollars-per-gpu-hour: must be a positive number of at most "),
])  # fmt: skip
def test_bad_flags_are_one_line(capsys, flags, message):
    assert cli.main([*FLAGS, *OLMOE, "--tokens", "8", *flags]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"flashmoe sim: error: {message}")
