"""A layer of weights that were loaded rank by rank computes, bit for bit, what one of all experts does."""

from dataclasses import replace

import numpy as np
import pytest
from cases import assert_same_bits, random_tokens
from published import BLOCKS, make_folder

from flashmoe_numba import FlashMoE
from flashmoe_numba.checkpoints import load
from reference import max_rel_error, moe_layer, tolerance
from reference.weights import EXPERT_ARRAYS


def joined(parts):
    """The experts of all ranks."""
    names = [name for name in EXPERT_ARRAYS if getattr(parts[0], name) is not None]
    return replace(parts[0], **{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, "float32") for family in BLOCKS), *((family, "bfloat16") for family in ("mixtral", "qwen3_vl_moe"))],
)
def test_ranks_that_load_their_own_experts(tmp_path, family, dtype):
    make_folder(tmp_path / "c", family, dtype=dtype)
    whole, weights = load(tmp_path / "c", 3, num_tokens=28)
    asked = dict(num_tokens=7, num_ranks=4)
    parts = [load(tmp_path / "c", 3, rank_idx=rank_idx, **asked) for rank_idx in range(4)]
    config = parts[0][0]
    assert all(other == config for other, _ in parts)
    x = random_tokens(config, counts=[7, 0, 3, 5])
    with FlashMoE(config, joined([part for _, part in parts]), num_processors=1) as layer:
        y = layer(x)
        chosen = [routing.topk_idx for routing in layer.routing], [routing.topk_weights for routing in layer.routing]
    assert max_rel_error(y, moe_layer(x, weights, config, *chosen)) <= tolerance(config)
    with FlashMoE(whole, weights, num_processors=2) as layer:
        assert_same_bits(np.concatenate(y), layer([np.concatenate(x)])[0], f"{family}, {dtype}, 4 ranks and 1")
