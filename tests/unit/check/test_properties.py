"""Every property finds a fault that is planted for it, which the comparison of ordinary cases does not; a layer that is
right passes all of them, in every number format."""

import planted_layers
import pytest

from flashmoe_numba.commands.check.inputs import Kind
from flashmoe_numba.commands.check.properties import PROPERTIES
from flashmoe_numba.commands.check.search import Result, look
from flashmoe_numba.commands.check.target import Target, answers

BY_NAME = {each.name: each for each in PROPERTIES}
FAULTS = {  # of ordinary cases first: those that the oracle shows
    "next_expert": "oracle",
    "last_row_dropped": "oracle",
    "weights_twice": "oracle",
    "weights_normalised": "oracle",
    "half_precision": "oracle",
    "other_dtype": "oracle",
    "no_array": "oracle",
    "raises": "oracle",
    "one_choice_unweighted": "one-choice",
    "last_choice_of_all_lost": "all-experts",
    "at_most_twelve_rows": "hot-experts",
    "one_token_squeezed": "one-token",
    "scale_of_no_tokens": "no-tokens",
    "padding_is_the_last_expert": "padding",
    "zero_is_no_weight": "zero-weights",
    "exp_overflows": "large-values",
    "one_scale_for_all": "large-values",
    "flushed": "subnormals",
    "nan_leaks": "nonfinite-rows",
    "nan_hidden": "nonfinite-rows",
    "takes_pieces": "strided",
    "changes_x": "inputs-kept",
    "changes_weights": "inputs-kept",
    "changes_choices": "inputs-kept",
    "other_each_time": "repeatable",
    "kept_buffer": "repeatable",
    "sums_by_batch": "batch",
    "sums_by_place": "row-order",
}
COMMON = {"one-choice", "all-experts", "hot-experts", "one-token"}  # ordinary cases happen to be such, too


def examined(name, asked, examples=20, seed=0, kind=Kind()):  # noqa: B008
    """What becomes of a property of one of `planted_layers`, in this process."""
    target, result = Target(f"{planted_layers.FILE}:{name}", False, planted_layers.FOLDER), Result(BY_NAME[asked])
    look(result, kind, lambda weights, calls: answers(target, weights, calls), examples, seed)
    return result


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_by_its_property(name):
    result = examined(name, FAULTS[name])
    assert result.verdict == "FAILS"
    if FAULTS[name] not in {"oracle", *COMMON}:
        assert examined(name, "oracle").verdict == "holds", "then what is this property good for?"


def test_every_property_has_a_fault():
    assert set(FAULTS.values()) == set(BY_NAME)


@pytest.mark.parametrize("asked", BY_NAME)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_a_layer_that_is_right_passes(asked, dtype):
    result = examined("layer", asked, kind=Kind(dtype=dtype))
    assert result.verdict == "holds", (result.worst, result.case)
    assert result.cases == 20
