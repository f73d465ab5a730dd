"""Targets that take tensors; skipped without PyTorch."""

import numpy as np
import pytest
from cases import assert_same_bits

torch = pytest.importorskip("torch")

from flashmoe_numba.commands.check.inputs import Case, Kind, make_inputs  # noqa: E402
from flashmoe_numba.commands.check.target import Target, TargetError, answers  # noqa: E402

SOURCE = """
import torch
class Experts(torch.nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.up, self.down = torch.nn.Parameter(weights.up_proj), weights.down_proj
        assert weights.gate_proj is None and weights.down_bias is None
    def forward(self, x, topk_idx, topk_weights):
        pairs = torch.relu(torch.einsum("th,tkfh->tkf", x, self.up[topk_idx]))
        rows = torch.einsum("tkf,tkhf->tkh", pairs, self.down[topk_idx])
        return (rows * topk_weights[..., None]).sum(1).to(x.dtype)
def changes(x, topk_idx, topk_weights, weights):
    weights.up_proj.add_(1)
    return x.mul_(2)
def array(x, topk_idx, topk_weights, weights):
    return x.float().numpy()
"""


@pytest.fixture
def target(tmp_path):
    (tmp_path / "tensors.py").write_text(SOURCE)
    return lambda name: Target(f"tensors.py:{name}", True, str(tmp_path))


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_a_module_gets_tensors_and_gives_one(target, dtype, strided):
    inputs = make_inputs(
        Case(num_tokens=4, hidden=5, ffn=3, num_experts=4, num_topk=2, seed=0), Kind(dtype, False, "relu")
    )
    (answer,) = answers(target("Experts"), inputs.weights, [inputs.call(strided=strided)])
    assert answer.y.dtype == inputs.config.numpy_dtype and answer.changed == []
    step = 2.0**-inputs.config.format.fraction_bits
    np.testing.assert_allclose(answer.y.astype(np.float64), inputs.expected, atol=16 * step)


def test_what_changes_in_place_is_seen(target):
    inputs = make_inputs(Case(num_tokens=4, hidden=5, ffn=3, num_experts=4, num_topk=2, seed=0), Kind("bfloat16"))
    (answer,) = answers(target("changes"), inputs.weights, [inputs.call()])
    assert answer.changed == ["x", "up_proj"]
    assert_same_bits(answer.y, inputs.x * inputs.x.dtype.type(2))


def test_an_array_is_no_tensor(target):
    inputs = make_inputs(Case(num_tokens=4, hidden=5, ffn=3, num_experts=4, num_topk=2, seed=0), Kind())
    with pytest.raises(TargetError, match="y must be a tensor, got ndarray"):
        answers(target("array"), inputs.weights, [inputs.call()])
