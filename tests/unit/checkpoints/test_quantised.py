"""Weights in a few bits: the numbers that they stand for are counted out here bit by bit, with Python's own numbers."""

import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import BFLOAT16, random, write_folder
from published import E, K

from flashmoe_numba.checkpoints import Checkpoint, load
from flashmoe_numba.checkpoints.fp8 import dequantise as from_fp8
from flashmoe_numba.checkpoints.mxfp4 import dequantise as from_mxfp4

E4M3, E5M2, E8M0 = (np.dtype(t) for t in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu))
HIDDEN, FFN = 64, 96
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
PREFIX = "model.layers.0.mlp."
STACKED = """
model_type = "my_moe"
[sizes]
hidden = 20
ffn = 30
num_experts = 8
num_topk = 2
[router]
[experts]
activation = "gelu"
gated = false
[disk]
prefix = "layers.{layer}."
router = "gate"
up_proj = "up.weight"
down_proj = "down.weight"
"""


def small_float(byte, exponent_bits, mantissa_bits, bias):
    """The number that a sign, an exponent and a mantissa stand for."""
    sign = -1.0 if byte >> (exponent_bits + mantissa_bits) else 1.0
    exponent = byte >> mantissa_bits & (1 << exponent_bits) - 1
    mantissa = (byte & (1 << mantissa_bits) - 1) / (1 << mantissa_bits)
    return sign * (2.0 ** (exponent - bias) * (1 + mantissa) if exponent else 2.0 ** (1 - bias) * mantissa)


def finite_bytes(rng, dtype, *shape):
    """Any finite numbers of an 8-bit type, as bytes."""
    every = np.arange(256, dtype=np.uint8)
    return rng.choice(every[np.isfinite(every.view(dtype).astype(np.float32))], shape)


@pytest.mark.parametrize(("dtype", "form"), [(E4M3, (4, 3, 7)), (E5M2, (5, 2, 15))], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (128, 256), (129, 5), (300, 130)])
def test_fp8_is_an_element_times_the_scale_of_its_block(dtype, form, rows, columns):
    rng = np.random.default_rng(rows)
    elements = finite_bytes(rng, dtype, rows, columns)
    scales = rng.uniform(1e-4, 1e-2, (-(-rows // 128), -(-columns // 128))).astype(np.float32)
    got = from_fp8(elements.view(dtype), scales)
    assert got.dtype == np.float32
    for i, j in [(0, 0), (rows - 1, columns - 1), *rng.integers(0, (rows, columns), (200, 2)).tolist()]:
        wanted = np.float32(small_float(int(elements[i, j]), *form)) * scales[i // 128, j // 128]
        assert got[i, j] == wanted, (i, j)


def test_mxfp4_is_an_element_times_a_power_of_two():
    rng = np.random.default_rng(1)
    blocks, scales = rng.integers(0, 256, (3, 5, 2, 16), np.uint8), rng.integers(90, 160, (3, 5, 2), np.uint8)
    got = from_mxfp4(blocks, scales)
    assert got.shape == (3, 5, 64) and got.dtype == np.float32
    for at in np.ndindex(got.shape):
        *row, column = at
        byte = int(blocks[*row, column // 32, column % 32 // 2])
        nibble = byte >> 4 if column % 2 else byte & 15
        wanted = small_float(nibble, 2, 1, 1) * 2.0 ** (int(scales[*row, column // 32]) - 127)
        assert got[at] == wanted, at
    assert np.array_equal(got, got.astype(BFLOAT16))  # so nothing is lost by rounding


def test_mxfp4_at_the_ends_of_the_range():
    blocks = np.full((3, 1, 16), 0x77, np.uint8)  # 6
    got = from_mxfp4(blocks, np.array([[0], [127], [255]], np.uint8))
    assert np.isnan(got[2]).all() and (got[1] == 6).all() and (got[0] == 6 * 2.0**-127).all()


def fp8_tensors(rng, num_bytes=E4M3, hidden=130, ffn=150, scale=np.float32):
    """A block as DeepSeek publishes it, and the arrays that it stands for. Blocks at the edges are partial."""
    tensors, arrays = {PREFIX + "gate.weight": random(rng, E, hidden, dtype="bfloat16")}, {}
    for name, (rows, columns) in {
        "gate_proj": (ffn, hidden),
        "up_proj": (ffn, hidden),
        "down_proj": (hidden, ffn),
    }.items():
        arrays[name] = np.empty((E, rows, columns), np.float32)
        for e in range(E):
            elements = finite_bytes(rng, num_bytes, rows, columns).view(num_bytes)
            scales = (2.0 ** rng.integers(-9, -2, (-(-rows // 128), -(-columns // 128)))).astype(scale)
            tensors[f"{PREFIX}experts.{e}.{name}.weight"] = elements
            tensors[f"{PREFIX}experts.{e}.{name}.weight_scale_inv"] = scales
            for i in range(rows):
                arrays[name][e, i] = (
                    elements[i].astype(np.float32) * scales[i // 128].astype(np.float32).repeat(128)[:columns]
                )
    return tensors, arrays


def config_of(hidden, ffn, **more):
    sizes = dict(
        hidden_size=hidden, moe_intermediate_size=ffn, intermediate_size=7, num_experts=E, num_experts_per_tok=K
    )
    return {"model_type": "qwen3_moe", **sizes, **more}


@pytest.mark.parametrize("scale", [np.float32, BFLOAT16, E8M0], ids=["float32", "bfloat16", "e8m0"])
def test_a_block_in_fp8(tmp_path, scale):
    tensors, arrays = fp8_tensors(np.random.default_rng(5), scale=scale)
    write_folder(tmp_path / "c", config_of(130, 150, torch_dtype="bfloat16", quantization_config=FP8), tensors, 3)
    read = 0
    for rank_idx in range(4):
        with Checkpoint(tmp_path / "c") as checkpoint:
            asked = dict(num_tokens=5, num_ranks=4, rank_idx=rank_idx)
            config, weights = checkpoint.load(0, **asked)
            assert config.dtype == "bfloat16"
            for name, array in arrays.items():
                assert np.array_equal(getattr(weights, name), array[2 * rank_idx :][:2].astype(BFLOAT16))
            read += checkpoint.bytes_read
    routers = 3 * tensors[PREFIX + "gate.weight"].nbytes
    assert read == sum(tensor.nbytes for tensor in tensors.values()) + routers
    exact = load(tmp_path / "c", 0, num_tokens=5, dtype="float32")[1]
    assert all(np.array_equal(getattr(exact, name), array) for name, array in arrays.items())


def test_blocks_of_another_size_and_single_scales(tmp_path):
    rng = np.random.default_rng(6)
    tensors, arrays = fp8_tensors(rng, hidden=20, ffn=30)
    for e in range(E):
        name = f"{PREFIX}experts.{e}.up_proj.weight"
        tensors[name + "_scale_inv"] = scales = (2.0 ** rng.integers(-9, -2, (4, 3))).astype(np.float32)
        arrays["up_proj"][e] = tensors[name].astype(np.float32) * np.kron(scales, np.ones((8, 8), np.float32))[:30, :20]
    how = FP8 | {"weight_block_size": [8, 8]}
    write_folder(tmp_path / "c", config_of(20, 30, quantization_config=how), tensors)
    _, weights = load(tmp_path / "c", 0, num_tokens=5, dtype="float32")
    assert all(np.array_equal(getattr(weights, name), array) for name, array in arrays.items())


def gpt_oss_tensors(rng):
    """A block as gpt-oss is published: rows of gate and up in turn, along `hidden` in blocks of 32."""
    blocks = {"gate_up_proj": (E, 2 * FFN, HIDDEN // 32, 16), "down_proj": (E, HIDDEN, FFN // 32, 16)}
    tensors = {PREFIX + "router.weight": random(rng, E, HIDDEN, dtype="bfloat16")}
    tensors |= {PREFIX + "router.bias": random(rng, E, dtype="bfloat16")}
    numbers = {}
    for name, shape in blocks.items():
        elements, scales = rng.integers(0, 256, shape, np.uint8), rng.integers(110, 130, shape[:-1], np.uint8)
        tensors[f"{PREFIX}experts.{name}_blocks"], tensors[f"{PREFIX}experts.{name}_scales"] = elements, scales
        tensors[f"{PREFIX}experts.{name}_bias"] = random(rng, *shape[:2], dtype="bfloat16")
        halves = np.stack([elements & 15, elements >> 4], -1)
        values = np.array([small_float(n, 2, 1, 1) for n in range(16)])[halves] * 2.0 ** (
            scales[..., None, None] - 127.0
        )
        numbers[name] = values.reshape(*shape[:2], -1)
    arrays = dict(gate_proj=numbers["gate_up_proj"][:, ::2], up_proj=numbers["gate_up_proj"][:, 1::2])
    return tensors, arrays | dict(down_proj=numbers["down_proj"])


def test_a_block_in_mxfp4(tmp_path):
    tensors, arrays = gpt_oss_tensors(np.random.default_rng(7))
    config = dict(hidden_size=HIDDEN, intermediate_size=FFN, num_local_experts=E, num_experts_per_tok=K)
    config |= dict(model_type="gpt_oss", quantization_config={"quant_method": "mxfp4"})
    write_folder(tmp_path / "c", config, tensors, 3)
    read = 0
    for rank_idx in range(4):
        with Checkpoint(tmp_path / "c") as checkpoint:
            config, weights = checkpoint.load(0, num_tokens=5, num_ranks=4, rank_idx=rank_idx)
            assert config.dtype == "bfloat16"
            for name, array in arrays.items():
                assert np.array_equal(getattr(weights, name), array[2 * rank_idx :][:2].astype(BFLOAT16))
            bias = tensors[PREFIX + "experts.gate_up_proj_bias"][2 * rank_idx :][:2]
            assert np.array_equal(weights.gate_bias, bias[:, ::2]) and np.array_equal(weights.up_bias, bias[:, 1::2])
            read += checkpoint.bytes_read
    routers = 3 * sum(tensor.nbytes for name, tensor in tensors.items() if "router" in name)
    assert read == sum(tensor.nbytes for tensor in tensors.values()) + routers


def without(tensors, name):
    return {each: tensor for each, tensor in tensors.items() if each != PREFIX + name}


SCALE = "experts.3.up_proj.weight_scale_inv"


@pytest.mark.parametrize(
    ("change", "how", "rule"),
    [
        (lambda t: without(t, SCALE), FP8, "'.*experts.3.up_proj.weight' needs its scales, .*which are missing"),
        (lambda t: t | {PREFIX + SCALE: np.ones((1, 2), np.float32)}, FP8, r"must have shape \[2, 2\], got \[1, 2\]"),
        (lambda t: t | {PREFIX + SCALE: np.ones((2, 2))}, FP8, "_scale_inv' must be of dtype F32 or .*, got F64"),
        (lambda t: t, FP8 | {"weight_block_size": [64, 128]}, r"_scale_inv' must have shape \[3, 2\], got \[2, 2\]"),
        (lambda t: t, {"quant_method": "gptq"}, "quant_method must be one of fp8, mxfp4; got 'gptq'"),
        (lambda t: t, "fp8", "quantization_config must be a table, got 'fp8'"),
        *(
            (lambda t: t, FP8 | {"weight_block_size": size}, "weight_block_size must be two integers above 0, got")
            for size in (128, [128], [128, 0], [128, 128, 1], ["128", 128], [True, 128])
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_scales(tmp_path, change, how, rule):
    tensors, _ = fp8_tensors(np.random.default_rng(8))
    write_folder(tmp_path / "c", config_of(130, 150, quantization_config=how), change(tensors))
    with pytest.raises(ValueError, match=rule):
        load(tmp_path / "c", 0, num_tokens=5)


@pytest.mark.parametrize(
    ("name", "tensor", "rule"),
    [
        ("experts.down_proj_scales", None, "needs its scales, .*down_proj_scales, which are missing"),
        ("experts.down_proj_scales", np.zeros((E, HIDDEN, 2), np.uint8), "_blocks' must have shape"),
        ("experts.down_proj_scales", np.zeros((E, HIDDEN, 3), np.float32), "_scales' must be of dtype U8 or F8_E8M0"),
        ("experts.down_proj_blocks", np.zeros((E, HIDDEN, 3, 8), np.uint8), "_blocks' must have shape"),
        ("experts.down_proj_blocks", np.zeros((E, HIDDEN, 3, 16), np.int64), "_blocks' must be of dtype .*; got I64"),
    ],
)
def test_what_is_wrong_with_mxfp4(tmp_path, name, tensor, rule):
    tensors, _ = gpt_oss_tensors(np.random.default_rng(9))
    tensors = without(tensors, name) if tensor is None else tensors | {PREFIX + name: tensor}
    config = dict(hidden_size=HIDDEN, intermediate_size=FFN, num_local_experts=E, num_experts_per_tok=K)
    write_folder(tmp_path / "c", config | dict(model_type="gpt_oss"), tensors)
    with pytest.raises(ValueError, match=rule):
        load(tmp_path / "c", 0, num_tokens=5)


def test_what_an_outer_config_says_of_all_parts(tmp_path):
    """A model that sees has its language model's config inside; how it is quantised, and its dtype, is said outside."""
    tensors, arrays = fp8_tensors(np.random.default_rng(5))
    inside = config_of(130, 150)
    for outer, inner, dtype in (("float16", {}, "float16"), ("float16", {"dtype": "float32"}, "float32")):
        model = dict(model_type="sees", torch_dtype=outer, quantization_config=FP8, text_config=inside | inner)
        write_folder(tmp_path / "c", model, tensors)
        config, weights = load(tmp_path / "c", 0, num_tokens=5)
        assert config.dtype == dtype
        assert np.array_equal(weights.up_proj, arrays["up_proj"].astype(dtype))
    model["quantization_config"] = {"quant_method": "gptq"}
    write_folder(tmp_path / "c", model, tensors)
    with pytest.raises(ValueError, match="quant_method must be one of fp8, mxfp4; got 'gptq'"):
        load(tmp_path / "c", 0, num_tokens=5)


def test_one_scale_for_a_tensor_of_all_experts(tmp_path):
    """It serves every expert's piece."""
    family = tmp_path / "my.toml"
    family.write_text(STACKED)
    rng = np.random.default_rng(8)
    tensors = {"layers.0.gate": random(rng, E, 20)}
    for name, shape in (("up", (E, 30, 20)), ("down", (E, 20, 30))):
        tensors[f"layers.0.{name}.weight"] = finite_bytes(rng, E4M3, *shape).view(E4M3)
        tensors[f"layers.0.{name}.weight_scale_inv"] = np.full((1,) * (1 if name == "up" else 3), 0.25, np.float32)
    write_folder(tmp_path / "c", dict(model_type="my_moe"), tensors)
    for rank_idx in range(4):
        asked = dict(num_tokens=5, num_ranks=4, rank_idx=rank_idx, dtype="float32", family=family)
        _, weights = load(tmp_path / "c", 0, **asked)
        own = slice(2 * rank_idx, 2 * rank_idx + 2)
        for name in ("up", "down"):
            wanted = tensors[f"layers.0.{name}.weight"].astype(np.float32)[own] / 4
            assert np.array_equal(getattr(weights, f"{name}_proj"), wanted)
