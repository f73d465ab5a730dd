"""Layers from checkpoints of many families: every array is the true one, and a rank reads only its own experts."""

import tracemalloc

import numpy as np
import pytest
from checkpoint_files import counted, write_folder
from published import BLOCKS, LAYERS, E, F, H, K, arrays_of, make_folder, tensors_of, truth

from flashmoe_numba.checkpoints import Checkpoint, load
from reference.weights import EXPERT_ARRAYS

LAYER = 3
WITH_ZEROS = """
model_type = "my_moe"
[sizes]
hidden = "$width"
ffn = "$inner"
num_experts = "$experts"
num_topk = 2
num_zero = "$zeros"
[router]
[experts]
activation = "gelu"
gated = false
[disk]
prefix = "layers.{layer}."
router = "gate"
up_proj = "up: choice ffn hidden"
down_proj = "down"
"""


def assert_true(weights, wanted, names, experts=slice(None)):
    for name, array in wanted.items():
        got = getattr(weights, name, None)
        if name not in names:
            assert got is None, name
            continue
        part = array[experts] if name in EXPERT_ARRAYS else array
        assert got.dtype == part.dtype and np.array_equal(got, part), name


@pytest.mark.parametrize("family", BLOCKS)
def test_every_array_is_the_true_one(tmp_path, family):
    make_folder(tmp_path / "c", family)
    config, weights = load(tmp_path / "c", LAYER, num_tokens=5)
    assert (config.hidden, config.ffn, config.num_experts, config.num_topk) == (H, F, E, K)
    assert (config.num_tokens, config.num_ranks, config.dtype) == (5, 1, "float32")
    assert_true(weights, truth(family, LAYER), arrays_of(family))
    assert Checkpoint(tmp_path / "c").layers == list(LAYERS)


@pytest.mark.parametrize("family", BLOCKS)
def test_a_rank_reads_its_own_experts_and_nothing_else(tmp_path, family):
    """So says the operating system: what it handed out beyond the files' headers is the rank's weights, to the byte."""
    make_folder(tmp_path / "c", family)
    for rank_idx in range(4):
        with Checkpoint(tmp_path / "c") as checkpoint:
            asked = dict(num_tokens=5, num_ranks=4, rank_idx=rank_idx)
            (config, weights), num_bytes = counted(lambda: checkpoint.load(LAYER, **asked))  # noqa: B023
            assert config.num_experts_per_rank == weights.num_experts == 2
            assert weights.first_expert == 2 * rank_idx
            assert_true(weights, truth(family, LAYER), arrays_of(family), slice(2 * rank_idx, 2 * rank_idx + 2))
            own = sum(getattr(weights, name).nbytes for name in arrays_of(family))
            assert checkpoint.bytes_read == own
            headers = sum(
                8 + int.from_bytes(file.read_bytes()[:8], "little") for file in (tmp_path / "c").glob("*.s*s")
            )
            assert own <= num_bytes <= own + headers


@pytest.mark.parametrize("stored", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", [None, "float64", "float32", "float16", "bfloat16"])
def test_types(tmp_path, stored, dtype):
    make_folder(tmp_path / "c", "mixtral", dtype=stored)
    config, weights = load(tmp_path / "c", LAYER, num_tokens=5, dtype=dtype)
    assert config.dtype == (dtype or stored)
    wanted = truth("mixtral", LAYER, stored)["up_proj"].astype(config.numpy_dtype)
    assert weights.up_proj.dtype == wanted.dtype and np.array_equal(weights.up_proj, wanted)
    same = stored == config.dtype
    router = truth("mixtral", LAYER, stored)["router"].astype(config.numpy_dtype if same else config.accumulator)
    assert weights.router.dtype == router.dtype and np.array_equal(weights.router, router)


def test_numbers_beyond_the_range_of_a_type_are_refused(tmp_path):
    tensors = tensors_of("mixtral", [LAYER], dtype="bfloat16")
    name = f"model.layers.{LAYER}.block_sparse_moe.experts.6.w2.weight"
    tensors[name][4, 5] = 70_000
    write_folder(tmp_path / "c", {"model_type": "mixtral", **BLOCKS["mixtral"][1]}, tensors)
    with pytest.raises(ValueError, match=f"dtype must hold all numbers of tensor '{name}'.*float16"):
        load(tmp_path / "c", LAYER, num_tokens=5, dtype="float16")
    tensors[name][4, 5] = np.inf  # is infinite in any type
    write_folder(tmp_path / "c", {"model_type": "mixtral", **BLOCKS["mixtral"][1]}, tensors)
    _, weights = load(tmp_path / "c", LAYER, num_tokens=5, dtype="float16")
    assert np.isinf(weights.down_proj).sum() == 1 and np.isinf(weights.down_proj[6, 4, 5])


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_vl_moe", "dbrx"])
def test_beside_the_weights_there_is_one_expert_in_memory(tmp_path, family, monkeypatch):
    """At the highest, one matrix of one expert as it is stored, and little that does not grow with sizes."""
    monkeypatch.setattr("published.H", 300)
    monkeypatch.setattr("published.F", 200)
    config = {name: {H: 300, F: 200}.get(size, size) for name, size in BLOCKS[family][1].items()}
    make_folder(tmp_path / "c", family, **config)
    with Checkpoint(tmp_path / "c") as checkpoint:
        checkpoint.config(LAYER, num_tokens=5)  # opens the files
        tracemalloc.start()
        _, weights = checkpoint.load(LAYER, num_tokens=5, num_ranks=4, rank_idx=2)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    matrix = 2 * 200 * 300 * 4  # gate and up may be one
    assert weights.num_bytes == (6 * 200 + E) * 300 * 4
    assert peak < weights.num_bytes + matrix + 100_000


@pytest.mark.parametrize("part", ["w1", "w2", "w3"])
def test_experts_of_several_types_need_a_dtype(tmp_path, part):
    """Or some would be rounded, and nobody had asked for it."""
    tensors = tensors_of("mixtral", [LAYER])
    name = f"model.layers.{LAYER}.block_sparse_moe.experts.6.{part}.weight"
    tensors[name] = tensors[name].astype(np.float16)
    write_folder(tmp_path / "c", {"model_type": "mixtral", **BLOCKS["mixtral"][1]}, tensors)
    with pytest.raises(ValueError, match=r"dtype must be given, because experts are stored in several: .* float16"):
        load(tmp_path / "c", LAYER, num_tokens=5)
    config, weights = load(tmp_path / "c", LAYER, num_tokens=5, dtype="float32")
    assert config.dtype == "float32" and weights.up_proj.dtype == np.float32


@pytest.mark.parametrize("num_zero", [1, 2 * E, 3 * E + 1])
def test_a_tensor_with_room_for_zero_computation_experts(tmp_path, num_zero):
    family = tmp_path / "my.toml"
    family.write_text(WITH_ZEROS)
    rng = np.random.default_rng(0)
    shapes = {"gate": (E + num_zero, H), "up": (E + num_zero, F, H), "down": (E, H, F)}
    tensors = {f"layers.0.{name}": rng.standard_normal(shape) for name, shape in shapes.items()}
    model = dict(model_type="my_moe", width=H, inner=F, experts=E, zeros=num_zero)
    folder = write_folder(tmp_path / "c", model, tensors)
    for rank_idx in range(4):
        _, weights = load(folder, 0, num_tokens=5, num_ranks=4, rank_idx=rank_idx, family=family)
        own = slice(2 * rank_idx, 2 * rank_idx + 2)
        assert np.array_equal(weights.up_proj, tensors["layers.0.up"][:E][own])
        assert np.array_equal(weights.down_proj, tensors["layers.0.down"][own])
