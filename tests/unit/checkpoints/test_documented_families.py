"""The families' files that the documents print are whole: layers are read with them, as printed."""

import numpy as np
import pytest
from checkpoint_files import random, write_folder
from children import ROOT
from published import E, F, H

from flashmoe_numba.checkpoints import from_state_dict, load

S = 7  # width of the shared expert
MODEL = dict(
    model_type="my_moe", hidden_size=H, moe_intermediate_size=F, num_experts=E, num_experts_per_tok=2,
    shared_expert_intermediate_size=S,
)  # fmt: skip


@pytest.fixture(params=["checkpoints.md", "models.md"])
def family(request, tmp_path):
    blocks = (ROOT / "docs" / request.param).read_text().split("```")[1::2]
    (text,) = (block for block in blocks if 'model_type = "my_moe"' in block)
    (tmp_path / "my.toml").write_text(text.removeprefix("toml"))
    return tmp_path / "my.toml"


def test_a_folder_is_read(family, tmp_path):
    rng, prefix = np.random.default_rng(0), "model.layers.3.mlp."
    shared = "shared_expert" in family.read_text()
    gate, up, down = ("gate_proj", "up_proj", "down_proj") if shared else ("w1", "w3", "w2")
    shapes = {f"experts.{e}.{name}.weight": (F, H) for e in range(E) for name in (gate, up)}
    shapes |= {f"experts.{e}.{down}.weight": (H, F) for e in range(E)} | {"gate.weight": (E, H)}
    shapes |= SHARED if shared else {}
    tensors = {prefix + name: random(rng, *shape) for name, shape in shapes.items()}
    folder = write_folder(tmp_path / "c", MODEL, tensors)
    config, weights = load(folder, 3, num_tokens=5, num_ranks=2, rank_idx=1, family=family)
    assert (config.hidden, config.ffn, config.shared_ffn) == (H, F, S if shared else 0)
    for e in range(E // 2):
        for array, name in ((weights.gate_proj, gate), (weights.up_proj, up), (weights.down_proj, down)):
            assert np.array_equal(array[e], tensors[f"{prefix}experts.{e + E // 2}.{name}.weight"])


def test_a_state_is_read(family):
    if "[state]" not in family.read_text():
        pytest.skip("only of folders")
    rng = np.random.default_rng(0)
    shapes = {"gate.weight": (E, H), "experts.gate_up_proj": (E, 2 * F, H), "experts.down_proj": (E, F, H)} | SHARED
    state = {name: random(rng, *shape) for name, shape in shapes.items()}
    _, weights = from_state_dict(MODEL, state, num_tokens=5, family=family)
    assert np.array_equal(weights.down_proj, state["experts.down_proj"].swapaxes(1, 2))
    assert np.array_equal(weights.shared_up_proj, state["shared_expert.up_proj.weight"])
    assert np.array_equal(weights.shared_gate_weight, state["shared_expert_gate.weight"][0])


SHARED = {
    "shared_expert.gate_proj.weight": (S, H),
    "shared_expert.up_proj.weight": (S, H),
    "shared_expert.down_proj.weight": (H, S),
    "shared_expert_gate.weight": (1, H),
}
