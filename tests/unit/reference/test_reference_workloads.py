"""Workloads do not depend on how they are cut; recordings say what is wrong with them."""

import numpy as np
import pytest
from children import printed

from reference import MoEConfig, Weights, load_preset, make_workload, route

NAMES = ("text", "uniform", "zipf:1.2", "hot")


def make_config(**fields):
    return MoEConfig(**(dict(num_ranks=4, num_tokens=96, hidden=19, ffn=8, num_experts=8, num_topk=3) | fields))


@pytest.mark.parametrize("name", NAMES)
def test_tokens_do_not_depend_on_the_ranks_they_are_split_over(name):
    whole = make_workload(name, make_config(num_ranks=1), 96, seed=5)
    for num_ranks in (2, 4, 8):
        parts = make_workload(name, make_config(num_ranks=num_ranks), 96 // num_ranks, seed=5)
        np.testing.assert_array_equal(np.concatenate(parts.x), whole.x[0])
        if name == "hot":
            np.testing.assert_array_equal(np.concatenate(parts.topk_idx), whole.topk_idx[0])
            np.testing.assert_array_equal(np.concatenate(parts.topk_weights), whole.topk_weights[0])
    uneven = make_workload(name, make_config(), [70, 0, 1, 25], seed=5)
    assert [len(part) for part in uneven.x] == [70, 0, 1, 25]
    np.testing.assert_array_equal(np.concatenate(uneven.x), whole.x[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_rank_makes_its_own_part(name):
    full, own = make_workload(name, make_config(), 37), make_workload(name, make_config(), 37, ranks=[2])
    assert len(own.x) == 1
    np.testing.assert_array_equal(own.x[0], full.x[2])
    if name == "hot":
        np.testing.assert_array_equal(own.topk_idx[0], full.topk_idx[2])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_standard_normal_in_the_element_type(name, dtype):
    config = make_config(dtype=dtype, hidden=64)
    x = np.concatenate(make_workload(name, config).x)
    assert x.dtype == config.numpy_dtype and x.shape == (384, 64)
    assert abs(x.astype(float).mean()) < 0.1 and abs(x.astype(float).std() - 1) < 0.1
    assert not np.array_equal(x, np.concatenate(make_workload(name, config, seed=1).x))


def test_equal_words_have_equal_rows():
    from pydoc_data.topics import topics

    x = np.concatenate(make_workload("text", make_config(), 96).x)
    words = "".join(c if c.isalnum() or c == "_" else " " for c in topics[min(topics)]).split()[:60]
    for first, word in enumerate(words):
        for second, other in enumerate(words):
            assert np.array_equal(x[first], x[second]) == (word == other)


def test_text_wraps():
    import re
    from pydoc_data.topics import topics

    num_words = sum(len(re.findall(r"\w+", text)) for text in topics.values())
    config = make_config(num_tokens=num_words + 3, hidden=1, num_ranks=1)
    x = make_workload("text", config).x[0]
    np.testing.assert_array_equal(x[num_words:], x[:3])


def test_zipf_exponent_sets_the_share_of_the_commonest_type():
    config = make_config(num_ranks=1, num_tokens=20000, hidden=2)
    for exponent in (0.0, 1.0, 1.5):
        _, counts = np.unique(make_workload(f"zipf:{exponent}", config).x[0], axis=0, return_counts=True)
        expected = 1 / np.sum(np.arange(1.0, 32769) ** -exponent)
        assert abs(counts.max() / 20000 - expected) < 0.01


def test_hot_sends_every_first_choice_to_expert_0():
    work = make_workload("hot", make_config())
    idx, weights = np.concatenate(work.topk_idx), np.concatenate(work.topk_weights)
    assert (idx[:, 0] == 0).all() and idx.dtype == np.int32
    others = np.bincount(idx[:, 1:].ravel(), minlength=8)
    assert others[0] == 0 and others[1:].min() > 384 * 2 / 7 * 0.7
    assert all(len(set(row)) == 3 for row in idx.tolist())
    assert (weights > 0).all() and weights.dtype == np.float32
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
@pytest.mark.parametrize("with_ranks", [False, True])
def test_recorded(tmp_path, suffix, with_ranks):
    config, path = make_config(num_ranks=2), tmp_path / f"run.{suffix}"
    x = np.random.default_rng(0).standard_normal((14, 19)).astype(np.float32)
    routing = route(x, Weights.random(config).router, config)
    arrays = {"x": x, "topk_idx": routing.topk_idx, "topk_weights": routing.topk_weights.astype(np.float32)}
    shape = (7, 2) if with_ranks else (14,)
    save(path, {key: array.reshape(*shape, -1) for key, array in arrays.items()})
    work = make_workload(str(path), config)
    assert [len(part) for part in work.x] == [7, 7]
    for key, array in arrays.items():
        np.testing.assert_array_equal(np.concatenate(getattr(work, key)), array)
    np.testing.assert_array_equal(make_workload(str(path), config, [3, 5], ranks=[1]).x[0], x[3:8])


def save(path, arrays):
    from safetensors.numpy import save_file

    np.savez(path, **arrays) if path.suffix == ".npz" else save_file(arrays, path)


def test_a_bfloat16_recording_in_a_process_that_has_not_met_bfloat16(tmp_path):
    ml_dtypes, safetensors = pytest.importorskip("ml_dtypes"), pytest.importorskip("safetensors.numpy")
    file = tmp_path / "x.safetensors"
    safetensors.save_file({"x": np.ones((3, 19), ml_dtypes.bfloat16)}, str(file))
    program = (
        "from reference import MoEConfig, make_workload\n"
        "c = MoEConfig(num_ranks=1, num_tokens=3, hidden=19, ffn=1, num_experts=1, num_topk=1)\n"
        f"print(make_workload({str(file)!r}, c).x[0].sum())"
    )
    assert printed("-c", program) == "57.0\n"


def test_recorded_uneven_and_without_routing(tmp_path):
    save(tmp_path / "a.npz", {"x": np.ones((11, 19))})
    work = make_workload(str(tmp_path / "a.npz"), make_config())
    assert [len(part) for part in work.x] == [3, 3, 3, 2] and work.topk_idx is None
    assert work.x[0].dtype == np.float32


@pytest.mark.parametrize(("arrays", "error", "message"), [
    ({"tokens": np.ones((4, 19))}, ValueError, r"must have x, .* it has \['tokens'\]"),
    ({"x": np.ones((4, 19)), "topk_idx": np.ones((4, 3), int)}, ValueError, r"none of .* it has \['topk_idx', 'x'\]"),
    ({"x": np.ones((4, 18))}, ValueError, r"x must have shape \[any, 19\], got \[4, 18\]"),
    ({"x": np.ones((2, 2, 2, 19))}, ValueError, r"x must have shape \[any, any, 19\], got \[2, 2, 2, 19\]"),
    ({"x": np.ones((4, 19), int)}, TypeError, "x must have a floating dtype"),
    ({"x": np.where(np.arange(4)[:, None] == 2, np.nan, np.ones((4, 19)))}, ValueError, "x must be finite .* in row 2"),
    ({"x": np.full((4, 19), 1e39)}, ValueError, "x must be finite in float32, .* in row 0"),
    ({"x": np.ones((1, 19)), "topk_idx": np.array([[1, 2, 3]]), "topk_weights": np.array([[1, np.nan, 1]])},
     ValueError, "topk_weights must be finite in float32, .* in row 0"),
    ({"x": np.ones((1, 19)), "topk_idx": np.array([[1, 2, 3]]), "topk_weights": np.array([[1, 1, np.inf]])},
     ValueError, "topk_weights must be finite"),
])  # fmt: skip
def test_bad_recordings(tmp_path, arrays, error, message):
    save(tmp_path / "bad.npz", arrays)
    with pytest.raises(error, match=message):
        make_workload(str(tmp_path / "bad.npz"), make_config())


def test_no_choice_in_a_recording_may_have_any_weight(tmp_path):
    idx, weights = np.array([[-1, 2, 8], [0, 8, 8]]), np.array([[np.nan, 0.5, np.inf], [1, -np.inf, np.nan]])
    save(tmp_path / "padded.npz", {"x": np.ones((2, 19)), "topk_idx": idx, "topk_weights": weights})
    work = make_workload(str(tmp_path / "padded.npz"), make_config(), num_tokens=np.array([1, 1, 0, 0]))
    assert np.concatenate(work.topk_idx).tolist() == [[-1, 2, -1], [0, -1, -1]]
    assert np.concatenate(work.topk_weights).tolist() == [[0, 0.5, 0], [1, 0, 0]]


def test_bad_arguments(tmp_path):
    config = make_config()
    for name in ("words", "zipf", "zipf:-1", "zipf:x", "hot:2", ""):
        with pytest.raises(ValueError, match=r"name must be one of: text, uniform, zipf:s.*hot, a path.*got"):
            make_workload(name, config)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none.npz"):
        make_workload(str(tmp_path / "none.npz"), config)
    with pytest.raises(ValueError, match=r"num_tokens must be in \[0, config.num_tokens=96\], got 97"):
        make_workload("text", config, 97)
    with pytest.raises(ValueError, match="num_ranks=4 of them, got"):
        make_workload("text", config, [1, 2])
    with pytest.raises(ValueError, match=r"ranks must be in \[0, num_ranks=4\), got 4"):
        make_workload("text", config, ranks=[4])
    save(tmp_path / "short.npz", {"x": np.ones((11, 19))})
    with pytest.raises(ValueError, match=r"num_tokens asks for tokens up to 12 in all, but .*short.npz has 11"):
        make_workload(str(tmp_path / "short.npz"), config, 3)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_file_that_is_no_recording_is_named(tmp_path, suffix):
    file = tmp_path / f"broken{suffix}"
    file.write_text("not an archive")
    with pytest.raises(ValueError, match=rf"broken{suffix} must be a readable {suffix} file"):
        make_workload(str(file), load_preset("laptop-tiny"))
