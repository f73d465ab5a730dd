"""A block's own state becomes a layer: NumPy's arrays, and tensors of PyTorch's kind without PyTorch."""

import subprocess
import sys

import numpy as np
import pytest
from checkpoint_files import BFLOAT16, random
from published import E, F, H

from flashmoe_numba.checkpoints import from_state_dict
from flashmoe_numba.checkpoints.state import as_array

MY_FAMILY = """
model_type = "my_moe"
[sizes]
hidden = "$width"
ffn = ["$no", 5, 11]
num_experts = 8
num_topk = 2
[router]
[experts]
activation = "silu"
gated = true
[state]
router = "gate.weight"
gate_up_proj = "experts.gate_up_proj"
down_proj = "experts.down_proj: expert ffn hidden"
"""
SHARED = {"gate_proj": (F, H), "up_proj": (F, H), "down_proj": (H, F)}


class Tensor:
    """What a tensor of PyTorch's has of what we use; its bfloat16 has no way to NumPy but as integers."""

    def __init__(self, array, dtype=None):
        self.array, self.dtype = array, f"torch.{dtype or array.dtype.name}"

    def detach(self):
        return self

    def cpu(self):
        return self

    def new_empty(self, size):
        return Tensor(np.empty(size, np.float32))

    def short(self):
        return Tensor(self.array.astype(np.int16))

    def view(self, dtype):
        return Tensor(self.array.view(dtype.removeprefix("torch.")))

    def numpy(self):
        if self.array.dtype == BFLOAT16:
            raise TypeError("Got unsupported ScalarType BFloat16")
        return self.array


def state(dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = {"gate.weight": (E, H), "experts.gate_up_proj": (E, 2 * F, H), "experts.down_proj": (E, F, H)}
    return {name: random(rng, *shape, dtype=dtype) for name, shape in shapes.items()}


@pytest.fixture
def family(tmp_path):
    (tmp_path / "my.toml").write_text(MY_FAMILY)
    return tmp_path / "my.toml"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [lambda array: array, Tensor], ids=["array", "tensor"])
def test_arrays_and_tensors(family, dtype, kind):
    arrays = state(dtype)
    tensors = {name: kind(array) for name, array in arrays.items()}
    asked = dict(num_tokens=3, family=family, layer=2, num_ranks=4, rank_idx=1)
    config, weights = from_state_dict(dict(model_type="my_moe", width=H), tensors, **asked)
    assert (config.ffn, config.dtype, weights.first_expert) == (F, dtype, 2)
    assert np.array_equal(weights.router, arrays["gate.weight"])
    assert np.array_equal(weights.gate_proj, arrays["experts.gate_up_proj"][2:4, :F])
    assert np.array_equal(weights.up_proj, arrays["experts.gate_up_proj"][2:4, F:])
    assert np.array_equal(weights.down_proj, arrays["experts.down_proj"][2:4].swapaxes(1, 2))


def test_weights_do_not_share_memory_with_the_state(family):
    """A training step behind our back must not change half a layer."""
    arrays = state()
    _, weights = from_state_dict(dict(model_type="my_moe", width=H), arrays, num_tokens=3, family=family, layer=2)
    before = weights.up_proj.copy()
    arrays["experts.gate_up_proj"][...] = 0
    assert np.array_equal(weights.up_proj, before)


def test_wrong_states(family):
    model = dict(model_type="my_moe", width=H)
    with pytest.raises(TypeError, match="state must be a dictionary of tensors, got list"):
        from_state_dict(model, [], num_tokens=3, family=family, layer=2)
    with pytest.raises(TypeError, match=r"state\['gate.weight'\] must be a NumPy array or a PyTorch tensor, got float"):
        from_state_dict(model, state() | {"gate.weight": 1.0}, num_tokens=3, family=family, layer=2)
    with pytest.raises(ValueError, match=r"state: tensor 'gate.weight' must have shape"):
        from_state_dict(model, state() | {"gate.weight": np.zeros((2, 3))}, num_tokens=3, family=family, layer=2)
    with pytest.raises(ValueError, match=r"must be of dtype .*got I64"):
        from_state_dict(model, state() | {"gate.weight": np.zeros((E, H), int)}, num_tokens=3, family=family, layer=2)
    with pytest.raises(ValueError, match=r"knows nothing of gate.bias"):
        from_state_dict(model, state() | {"gate.bias": np.zeros(E)}, num_tokens=3, family=family, layer=2)


def test_torch_is_not_imported():
    program = (
        "import sys, flashmoe_numba.checkpoints as c; print(sorted({'torch', 'numba', 'mpi4py'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"


def test_tensors_of_torch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        tensor = torch.nn.Parameter(torch.from_numpy(rng.standard_normal((3, 5))).to(dtype), requires_grad=False)
        array = as_array("x", tensor)
        assert array.dtype.name == str(dtype).removeprefix("torch.")
        assert np.array_equal(array.astype(np.float64), tensor.double().numpy())
    grown = torch.nn.Parameter(torch.ones(3))
    assert np.array_equal(as_array("x", grown), np.ones(3))


def test_a_config_that_is_none(family):
    for model in ([("model_type", "my_moe")], "my_moe", None):
        with pytest.raises(TypeError, match=r"model must be a dictionary of what is in config\.json, got"):
            from_state_dict(model, state(), num_tokens=3, family=family, layer=2)


def test_every_family_of_the_model_type_is_tried():
    """Of deepseek_v4 the first has a bias for the choice, which layers with given experts do not have."""
    sizes = dict(hidden_size=H, moe_intermediate_size=F, num_local_experts=E, num_experts_per_tok=2)
    shared = {f"shared_experts.{name}.weight": shape for name, shape in SHARED.items()}
    arrays = state() | {name: np.ones(shape, np.float32) for name, shape in shared.items()}
    arrays["experts.down_proj"] = arrays["experts.down_proj"].swapaxes(1, 2)
    model = dict(model_type="deepseek_v4", **sizes)
    config, weights = from_state_dict(model, arrays, num_tokens=3)
    assert config.router_kind.choice == "given" and weights.selection_bias is None
    bias = {"gate.e_score_correction_bias": np.ones(E, np.float32)}
    config, weights = from_state_dict(model, arrays | bias, num_tokens=3)
    assert config.router_kind.choice == "score" and np.array_equal(weights.selection_bias, np.ones(E))
    each = (
        r"not deepseek_v4, because selection_bias is missing.*; not deepseek_v4_hash, because .* nothing of gate\.more"
    )
    with pytest.raises(ValueError, match=each):
        from_state_dict(model, arrays | {"gate.more": np.ones(E, np.float32)}, num_tokens=3)
    with pytest.raises(ValueError, match=r"^layer must be one with experts, got 0"):  # the same of both
        from_state_dict(model, {}, num_tokens=3)


class Unreadable(Tensor):
    """As PyTorch's tensors on "meta", which cannot be copied."""

    device, layout = "meta", "torch.strided"

    def cpu(self):
        raise NotImplementedError("Cannot copy out of meta tensor; no data!")


def test_tensors_that_have_no_numbers_here_are_named(family):
    arrays = state() | {"gate.weight": Unreadable(np.zeros((E, H), np.float32))}
    rule = (
        r"state\['gate.weight'\] must be a dense tensor of numbers, got torch.float32, meta, torch.strided: Cannot copy"
    )
    with pytest.raises(TypeError, match=rule):
        from_state_dict(dict(model_type="my_moe", width=H), arrays, num_tokens=3, family=family, layer=2)


def test_tensors_of_torch_that_have_no_numbers_here():
    torch = pytest.importorskip("torch")
    wrong = [torch.zeros(3, device="meta"), torch.zeros(3, 3).to_sparse(), torch.zeros(3).to(torch.float8_e4m3fnuz)]
    for tensor in wrong:
        with pytest.raises(TypeError, match=r"state\['x'\] must be a dense tensor of numbers, got torch\.float"):
            as_array("x", tensor)
