"""Random weights are the same however they are cut; shards are views; check names both sides."""

from dataclasses import replace

import numpy as np
import pytest

from reference import MoEConfig, Weights

EXPERT_ARRAYS = ("up_proj", "down_proj", "gate_proj", "up_bias", "down_bias", "gate_bias")


def make_config(**fields):
    sizes = dict(num_ranks=2, num_tokens=4, hidden=35, ffn=21, num_experts=6, num_topk=2, gated=True)
    return MoEConfig(**(sizes | fields))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_slice_equals_the_slice_of_the_full_set(dtype):
    config = make_config(dtype=dtype)
    full, part = Weights.random(config, 7, bias=True), Weights.random(config, 7, bias=True, experts=range(2, 5))
    assert part.num_experts == 3 and part.first_expert == 2
    np.testing.assert_array_equal(part.router, full.router)
    for name in EXPERT_ARRAYS:
        np.testing.assert_array_equal(getattr(part, name), getattr(full, name)[2:5])
        assert getattr(part, name).dtype == config.numpy_dtype
    assert full.router.dtype == (np.float64 if dtype == "float64" else np.float32)


def test_biases_do_not_move_the_matrices_and_seeds_and_experts_differ():
    config = make_config()
    plain, biased, other = Weights.random(config), Weights.random(config, bias=True), Weights.random(config, seed=1)
    assert plain.up_bias is None and biased.up_bias is not None
    np.testing.assert_array_equal(plain.gate_proj, biased.gate_proj)
    assert not np.array_equal(plain.up_proj, other.up_proj) and not np.array_equal(plain.router, other.router)
    assert not np.array_equal(plain.up_proj[0], plain.up_proj[1])
    assert not np.array_equal(plain.up_proj[0], plain.gate_proj[0])


def test_scale_is_one_over_root_fan_in():
    weights = Weights.random(make_config(hidden=300, ffn=75))
    for array, fan_in in (
        (weights.router, 300),
        (weights.up_proj, 300),
        (weights.gate_proj, 300),
        (weights.down_proj, 75),
    ):
        np.testing.assert_allclose(array.std() * fan_in**0.5, 1, atol=0.05)


def test_shard_gives_views_of_the_owned_experts():
    config = make_config()
    full = Weights.random(config, bias=True)
    shard = full.shard(1, 2)
    assert shard.first_expert == 3 and shard.num_experts == 3 and shard.router is full.router
    for name in EXPERT_ARRAYS:
        assert np.shares_memory(getattr(shard, name), getattr(full, name))
        np.testing.assert_array_equal(getattr(shard, name), getattr(full, name)[3:])
    shard.check(config)
    finer = shard.shard(2, 3).shard(5, 6)
    assert finer.first_expert == 5 and np.array_equal(finer.down_proj, full.down_proj[5:])
    with pytest.raises(ValueError, match="rank_idx=0 of 2 starts at expert 0; only 3 to 5 are present"):
        shard.shard(0, 2)
    with pytest.raises(ValueError, match="num_ranks must divide num_experts=6, got 4"):
        full.shard(0, 4)
    with pytest.raises(ValueError, match=r"rank_idx must be in \[0, num_ranks=2\), got 2"):
        full.shard(2, 2)


def test_num_bytes():
    config = make_config(dtype="float16", gated=False)
    weights = Weights.random(config, bias=True)
    assert weights.num_bytes == 6 * 35 * 4 + 6 * (2 * 35 * 21 + 21 + 35) * 2


def test_shards_are_counted_by_integers():
    weights = Weights.random(make_config())
    with pytest.raises(TypeError, match=r"rank_idx must be an integer, got 0\.5"):
        weights.shard(0.5, 2)
    with pytest.raises(TypeError, match="num_ranks must be an integer, got '2'"):
        weights.shard(0, "2")


def test_non_contiguous_arrays_are_fine():
    config = make_config(dtype="float64")
    weights = Weights.random(config)
    replace(weights, up_proj=np.asfortranarray(weights.up_proj)).check(config)
    weights.check(config)


@pytest.mark.parametrize(("fields", "error", "message"), [
    ({"router": np.ones((5, 35), np.float32)}, ValueError, r"router must have shape \[6, 35\], got \[5, 35\]"),
    ({"router": np.ones((6, 35), np.float16)}, TypeError, "router must have dtype float32, got float16"),
    ({"first_expert": 0.0}, TypeError, "first_expert must be an integer, got 0.0"),
    ({"up_proj": np.ones((6, 35, 21), np.float32)}, ValueError, r"shape \[any, 21, 35\], got \[6, 35, 21\]"),
    ({"down_proj": np.ones((5, 35, 21), np.float32)}, ValueError, r"down_proj must have shape \[6, 35, 21\], got \[5,"),
    ({"gate_bias": np.ones((6, 35), np.float32)}, ValueError, r"gate_bias must have shape \[6, 21\], got \[6, 35\]"),
    ({"down_bias": np.ones((6, 35))}, TypeError, "down_bias must have config's dtype float32, got float64"),
    ({"gate_proj": None}, ValueError, "gate_proj is missing, but config's experts are gated"),
    ({"up_proj": [[1.0]]}, TypeError, "up_proj must be a NumPy array, got list"),
    ({"first_expert": 1}, ValueError, r"first_expert must be in \[0, 0\] for 6 experts, got 1"),
])  # fmt: skip
def test_check_names_both_sides(fields, error, message):
    config = make_config()
    with pytest.raises(error, match=message):
        replace(Weights.random(config), **fields).check(config)


def test_plain_experts_take_no_gate():
    gated = Weights.random(make_config())
    with pytest.raises(ValueError, match=r"gate_proj is given, but config's experts are not gated"):
        gated.check(make_config(gated=False))


def test_bad_experts_and_seeds():
    for experts, error in ((range(7), ValueError), (range(0, 6, 2), ValueError), ([0, 1], TypeError)):
        with pytest.raises(error, match="experts must be"):
            Weights.random(make_config(), experts=experts)
    with pytest.raises(ValueError, match="seed must be >= 0, got -1"):
        Weights.random(make_config(), seed=-1)
