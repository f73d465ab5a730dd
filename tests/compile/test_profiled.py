"""What stands behind `flashmoe compile --run --backward`: a call and its backward on PTX, judged and counted."""

import importlib.util
import re

import pytest

if not importlib.util.find_spec("numba_cuda"):
    pytest.skip("numba-cuda is not installed: pip install 'flashmoe-numba[compile]'", allow_module_level=True)

from flashmoe_numba.build.variants import Variant
from flashmoe_numba.commands.profiled import run_variant
from flashmoe_numba.ptx import simulated
from flashmoe_numba.ptx.linked import linked_ptx
from reference import MoEConfig
from reference.task_kinds import KIND_NAMES

pytestmark = pytest.mark.timeout(600)  # the first one compiles the machine, a minute or two

LANES = Variant(dtype="float32", architecture="sm_80", tensor_cores=False, backward=True)
TENSOR = Variant(dtype="float16", architecture="sm_90a", tensor_cores=True, backward=True)
SIZES = dict(num_ranks=2, num_tokens=5, hidden=40, ffn=24, num_experts=4, num_topk=2, shared_ffn=8)


@pytest.fixture(autouse=True)
def texts(folder, monkeypatch):
    """Of the session's folder, by variant; what a test puts in is run in place of the kernel's own."""
    instead = {}
    monkeypatch.setattr(simulated, "linked_ptx", lambda variant, _: instead.get(variant) or linked_ptx(variant, folder))
    return instead


@pytest.mark.parametrize("variant", [LANES, TENSOR], ids=lambda variant: variant.name)
def test_a_backward_is_run_judged_and_counted_by_kinds_of_tasks(variant):
    """Of the forward before it nothing is counted; lanes make gradients of weights everywhere."""
    config = MoEConfig(**SIZES, dtype=variant.dtype)
    found = run_variant(variant, config)
    rows = {row["activity"]: row for row in found["activities"]}
    assert found["failures"] == [] and found["config"]["num_tokens"] == 5
    assert rows.keys() >= {*KIND_NAMES, "WEIGHTS", "ROUTER_WEIGHTS", "SHARED_WEIGHTS"}
    assert sum(row["instructions"] for row in rows.values()) <= found["steps"]
    multiplied = {name for name, row in rows.items() if row["products"] > 0}
    assert multiplied == ({"GEMM0", "GEMM1", "SHARED0", "SHARED1"} if variant.tensor_cores else set())


def test_a_wrong_gradient_is_a_failure_that_names_it(folder, texts):
    text = linked_ptx(LANES, folder)
    texts[LANES] = re.sub(r"fma\.rn\.f32 \t(%\w+), (%\w+), %\w+,", r"fma.rn.f32 \t\1, \2, \2,", text)
    found = run_variant(LANES, MoEConfig(**SIZES, dtype="float32"))
    assert any(failure.startswith("the gradient of up_proj may be off") for failure in found["failures"])
