"""Routings from files: flat, by rank, by layer, with no choices; histograms; and what cannot be read."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from reference import MoEConfig
from sim.world.recorded import _drawn_to
from sim.world.routing import make_routing

CONFIG = MoEConfig(num_ranks=2, num_tokens=3, hidden=8, ffn=8, num_experts=12, num_topk=3)


def draw(*shape, experts=12, topk=3, seed=0):
    """`[*shape, topk]` distinct experts."""
    ranked = np.random.default_rng(seed).random((*shape, experts)).argsort(axis=-1)
    return np.ascontiguousarray(ranked[..., :topk])


def read(file, config=CONFIG, layer=None):
    return make_routing(str(file), config, layer=layer)


def test_flat_recordings_are_read_rank_after_rank(tmp_path):
    rows = draw(10)
    np.savez(tmp_path / "topk.npz", topk_idx=rows, other=np.zeros(1, int))
    np.savez(tmp_path / "any.npz", experts_of_tokens=rows.astype(np.int16), scores=np.zeros(4))
    np.savez(tmp_path / "several.npz", first=rows, second=rows[::-1])
    np.save(tmp_path / "one.npy", rows)
    np.savetxt(tmp_path / "rows.csv", rows, "%d", ", ")
    save_file({"x": rows}, tmp_path / "one.safetensors")
    for name in ("topk.npz", "any.npz", "several.npz:first", "one.npy", "rows.csv", "one.safetensors"):
        routing = read(tmp_path / name)
        np.testing.assert_array_equal(routing.topk_idx.reshape(-1, 3), rows[:6])
        assert routing.name == str(tmp_path / name)
    np.testing.assert_array_equal(read(tmp_path / "several.npz:second").topk_idx.reshape(-1, 3), rows[:-7:-1])


def test_a_recording_by_rank_keeps_its_ranks_when_fewer_tokens_are_asked_for(tmp_path):
    rows = draw(2, 7)
    save_file({"topk_idx": rows}, tmp_path / "ranks.safetensors")
    routing = read(tmp_path / "ranks.safetensors")
    np.testing.assert_array_equal(routing.topk_idx, rows[:, :3])
    assert routing.name.endswith("ranks.safetensors, by rank")
    own = np.arange(2)[:, None, None] * 6 + draw(2, 7, experts=6)
    np.savez(tmp_path / "own.npz", topk_idx=own)
    assert not read(tmp_path / "own.npz").traffic(read(tmp_path / "own.npz").counts)[[0, 1], [1, 0]].any()


def test_layers_are_never_taken_for_ranks(tmp_path):
    by_layer, by_both = draw(5, 9), draw(5, 2, 4)
    np.savez(tmp_path / "layers.npz", topk_idx=by_layer, topk_weights=np.ones(by_layer.shape))
    np.save(tmp_path / "both.npy", by_both)
    routing = read(tmp_path / "layers.npz", layer=4)
    np.testing.assert_array_equal(routing.topk_idx.reshape(-1, 3), by_layer[4, :6])
    assert routing.name.endswith("layers.npz, layer 4")
    np.testing.assert_array_equal(read(tmp_path / "both.npy", layer=1).topk_idx, by_both[1, :, :3])
    with pytest.raises(ValueError, match=r"leading index of num_ranks=2, .* by layer .--layer.; got shape \[5, 9, 3\]"):
        read(tmp_path / "layers.npz")
    with pytest.raises(ValueError, match=r"layers and ranks: say which by layer .--layer.; got shape \[5, 2, 4, 3\]"):
        read(tmp_path / "both.npy")
    with pytest.raises(ValueError, match=r"layer must be in \[0, 5\), got 5"):
        read(tmp_path / "layers.npz", layer=5)
    np.save(tmp_path / "flat.npy", by_layer[0])
    with pytest.raises(ValueError, match=r"flat.npy has no layers, so layer must not be given; got 1"):
        read(tmp_path / "flat.npy", layer=1)
    with pytest.raises(ValueError, match="layer must be None for a routing that is drawn, even; got 1"):
        read("even", layer=1)


def test_no_choice_in_a_recording_goes_nowhere(tmp_path):
    rows = np.array([[0, -1, 12], [-1, -1, -1], [12, 12, 5], [3, 4, 5], [1, 12, 5], [5, 2, -1]])
    weights = np.where((rows < 0) | (rows == 12), np.nan, 0.5)
    np.savez(tmp_path / "padded.npz", topk_idx=rows, topk_weights=weights)
    routing = read(tmp_path / "padded.npz")
    assert routing.topk_idx.reshape(-1, 3).tolist() == np.where(rows == 12, -1, rows).tolist()
    assert routing.counts.sum() == 9 and routing.counts[:, 5].tolist() == [1, 3]
    assert routing.dropped == 0, "nothing was dropped that was never chosen"
    dropping = read(tmp_path / "padded.npz", replace(CONFIG, capacity=2))
    assert dropping.counts[:, 5].tolist() == [1, 2] and (dropping.counts.sum(), dropping.dropped) == (8, 1)


# ---- histograms


def test_a_histogram_gives_each_expert_its_tokens(tmp_path):
    config = replace(CONFIG, num_tokens=8)
    counts = np.array([16, 0, 1, 2, 3, 4, 5, 6, 7, 1, 2, 1])  # 48 = 2 ranks, 8 tokens, 3 choices
    np.save(tmp_path / "counts.npy", counts)
    np.savez(tmp_path / "shares.npz", load=counts / 7.5)
    np.savetxt(tmp_path / "column.csv", counts, "%d")
    lines = [f"{expert}, {number}" for expert, number in enumerate(counts) if number]
    (tmp_path / "table.csv").write_text("Expert,Tokens\n" + "\n".join(reversed(lines)), encoding="utf-8")
    for name in ("counts.npy", "shares.npz", "column.csv", "table.csv"):
        routing = read(tmp_path / name, config)
        assert routing.counts.sum(axis=0).tolist() == counts.tolist(), name
        assert all(len({*token}) == 3 for token in routing.topk_idx.reshape(-1, 3).tolist())
        assert routing.name == f"{tmp_path / name}, histogram"
    one, other = (make_routing(str(tmp_path / "counts.npy"), config, seed) for seed in (1, 2))
    assert not np.array_equal(one.counts, other.counts), "which rank has them is drawn"


def test_histograms_by_rank_and_by_layer(tmp_path):
    config = replace(CONFIG, num_tokens=4)
    by_rank = np.zeros((2, 12), int)
    by_rank[0, 6:9], by_rank[1, :4] = 4, 3
    np.save(tmp_path / "ranks.npy", by_rank)
    routing = read(tmp_path / "ranks.npy", config)
    np.testing.assert_array_equal(routing.counts, by_rank)
    assert routing.name.endswith("ranks.npy, histogram, by rank")
    by_layer = np.stack([by_rank[:, ::-1], by_rank])
    np.save(tmp_path / "both.npy", by_layer)
    np.testing.assert_array_equal(read(tmp_path / "both.npy", config, layer=1).counts, by_rank)
    lines = [f"{rank},{expert},{by_rank[rank, expert]}" for rank, expert in np.argwhere(by_rank)]
    table = "\n".join(["rank,expert,tokens", *lines])
    (tmp_path / "ranks.csv").write_text(table, encoding="utf-8")
    np.testing.assert_array_equal(read(tmp_path / "ranks.csv", config).counts, by_rank)
    np.save(tmp_path / "layers.npy", np.ones((5, 12)))
    with pytest.raises(ValueError, match=r"leading index of num_ranks=2, .* by layer .--layer.; got shape \[5, 12\]"):
        read(tmp_path / "layers.npy", config)


@given(st.data())
def test_drawn_counts_are_the_shares_rounded(data):
    num_experts = data.draw(st.integers(1, 9))
    num_topk = data.draw(st.integers(1, num_experts))
    tokens = data.draw(st.integers(1, 40))
    hits = np.array([data.draw(st.integers(0, 20)) for _ in range(num_experts)]) + 20 * (num_topk - 1) + 1
    exact = hits / hits.sum() * tokens * num_topk
    if exact.max() > tokens:
        return
    choices = _drawn_to("x", hits, tokens, num_topk, np.random.default_rng(0))
    counts = np.bincount(choices.ravel(), minlength=num_experts)
    assert choices.shape == (tokens, num_topk) and (np.abs(counts - exact) < 1 - 1e-6).all()
    up, remainder = counts > exact + 1e-6, exact % 1
    assert remainder[up].min(initial=1) >= remainder[(counts < exact - 1e-6)].max(initial=0), "the largest go up"
    assert all(len({*row}) == num_topk for row in choices.tolist())


# ---- what is wrong


@pytest.mark.parametrize(
    ("arrays", "rule"),
    [
        (dict(x=np.zeros((2, 8)), y=np.zeros(2)), r"or one array; name one with FILE:KEY; it has \['x', 'y'\]"),
        (dict(topk_idx=np.zeros((6, 2), int)), r"num_topk=3 choices or num_choices=12 .*, got shape \[6, 2\]"),
        (dict(topk_idx=draw(5)), "num_ranks=2 times num_tokens=3 rows, got 5"),
        (dict(topk_idx=draw(2, 2)), "num_tokens=3 rows of each rank, got 2"),
        (dict(topk_idx=np.tile([0, 1, 13], (6, 1))), r"in \[0, num_experts=12\)"),
        (dict(topk_idx=np.tile([0, 1, -2], (6, 1))), r"in \[0, num_experts=12\)"),
        (dict(topk_idx=draw(6), topk_weights=np.full((6, 3), np.nan)), "weights must be finite"),
        (dict(topk_idx=draw(6), topk_weights=np.ones((6, 2))), r"shape \[6, 3\], got \[6, 2\]"),
        (dict(topk_idx=np.tile([0, 1, 1], (6, 1))), "bad.npz: .* distinct"),
        (dict(names=np.array(["a"])), "must have numbers, got <U1"),
        (dict(load=np.ones(11)), "must have num_choices=12 experts, got 11"),
        (dict(load=np.zeros(12)), "numbers of tokens >= 0, and some for each rank"),
        (dict(load=np.r_[np.ones(11), np.inf]), "finite numbers of tokens >= 0"),
        (dict(load=np.full(12, 1e308)), "finite numbers of tokens >= 0"),
        (dict(load=np.r_[np.ones(11), np.nan]), "finite numbers of tokens >= 0"),
        (dict(topk_idx=np.zeros((0, 3), int)), "num_ranks=2 times num_tokens=3 rows, got 0"),
        (dict(topk_idx=np.zeros(0)), "must have num_choices=12 experts, got 0"),
        (dict(topk_idx=np.array(5)), r"num_topk=3 choices or num_choices=12 tokens of experts, got shape \[\]"),
        (dict(topk_idx=np.full((6, 3), 0.5)), "bad.npz must have integers as choices, got float64"),
        (dict(topk_idx=np.ones((6, 3), bool)), "bad.npz must have numbers, got bool"),
        (dict(load=np.r_[np.ones(11), 6]), r"expert 11 must have at most 1 / num_topk=3 of all choices.*; got 0.353"),
    ],
)
def test_bad_recordings_say_what_is_wrong(tmp_path, arrays, rule):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises((TypeError, ValueError), match=rule):
        read(tmp_path / "bad.npz")


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", r"bad\.csv"),
        ("a,b,c\n1,2,3\n", "could not convert string"),
        ("1,2,3\n4,5\n", "inhomogeneous"),
        ("expert,tokens\n1,2\n1,3\n", "named once"),
        ("expert,tokens\n-1,2\n", r"integers in \[0, 10000000\)"),
        ("expert,tokens\ninf,2\n", r"integers in \[0, 10000000\)"),
        ("expert,tokens\n999999999999,2\n", r"integers in \[0, 10000000\)"),
        ("layer,rank,expert,tokens\n900,900,900,2\n", r"at most 10000000 numbers, got \[901, 901, 901\]"),
    ],
)
def test_bad_tables_name_the_file(tmp_path, text, rule):
    (tmp_path / "bad.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rule):
        read(tmp_path / "bad.csv")


@pytest.mark.parametrize("name", ["none.npz", "none.npy", "none.csv", "none.safetensors:x"])
def test_no_such_recording(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=rf"no file .*{name.partition(':')[0]}"):
        read(tmp_path / name)


def test_no_such_key(tmp_path):
    np.savez(tmp_path / "one.npz", topk_idx=draw(6))
    with pytest.raises(ValueError, match=r"one\.npz must have other; it has \['topk_idx'\]"):
        read(tmp_path / "one.npz:other")
