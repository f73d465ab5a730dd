"""The backward under mpirun: the bits of one rank's gradients, and ranks that make other calls, or are lost in one."""

import re

import numpy as np
import pytest
from backward_cases import arrays_of, is_replicated
from cases import bits
from losing import VICTIM, last_words
from nightly import at_night_only
from test_layer_mpi import GUARDED, assert_named, run
from training_worker import LAYERS, NUM_GLOBAL, REFUSED, make_layer, tokens

from flashmoe_numba import FlashMoE
from flashmoe_numba.kernel.signals import LAST_CALL
from reference.layout import SAVES

pytestmark = pytest.mark.mpi
pytest.importorskip("mpi4py", reason="the extra `mpi` is not installed")
WORKER = "training_worker.py"


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    """Gradients on one rank of this process, by layer and name; and the kernels are in the disk cache."""
    found = {}
    for layer_name in LAYERS:
        config, weights = make_layer(1, layer_name)
        x, dy = tokens(config)
        with FlashMoE(config, weights, save="rows+up", num_processors=2) as layer:
            first, second = (layer.forward([part])[1] for part in (x, -x))
            gradients = layer.backward(second, [dy], into=layer.backward(first, [dy]))
        arrays = {"x": gradients.x[0], "topk_weights": gradients.topk_weights[0], "logits": gradients.logits[0]}
        arrays |= arrays_of(gradients.weights[0])
        found[layer_name] = {name: bits(array) for name, array in arrays.items()}
    return found


@pytest.mark.parametrize("num_ranks", [2, *at_night_only(4), 8])
def test_gradients_have_the_bits_of_one_rank(num_ranks, one_rank, tmp_path):
    status, err, errors = run("gradients", num_ranks, tmp_path, worker=WORKER)
    assert status == 0 and not errors, f"{errors}\n{err}"
    assert_gradients_of_one_rank(one_rank, num_ranks, tmp_path)


def assert_gradients_of_one_rank(one_rank, num_ranks, folder):
    """What ranks have saved of "gradients"."""
    saved = [np.load(folder / f"rank{rank}.npz") for rank in range(num_ranks)]
    assert sum(len(part["float32 rows x"]) for part in saved) == NUM_GLOBAL
    for layer_name, expected in one_rank.items():
        for save in SAVES:
            for name, array in expected.items():
                parts = [part[f"{layer_name} {save} {name}"] for part in saved]
                if not is_replicated(name):  # those are each rank's own
                    np.testing.assert_array_equal(np.concatenate(parts), array, err_msg=f"{layer_name} {save} {name}")


def test_the_router_of_a_rank_sees_its_own_tokens(one_rank, tmp_path):
    """Its parts add up to one rank's, but for the order of the sum; all else has the bits of one rank's."""
    status, err, errors = run("gradients", 4, tmp_path, worker=WORKER)
    assert status == 0 and not errors, f"{errors}\n{err}"
    assert_gradients_of_one_rank(one_rank, 4, tmp_path)
    saved = [np.load(tmp_path / f"rank{rank}.npz")["float64 rows router"].view(np.float64) for rank in range(4)]
    assert all(part.any() for part in saved[1:])
    np.testing.assert_allclose(sum(saved), one_rank["float64"]["router"].view(np.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("scenario", "theirs", "others"),
    [
        ("other_calls", "a forward", "the backward of call 1"),
        ("other_handles", "the backward of call 3", "the backward of call 1"),
    ],
)
def test_ranks_that_make_other_calls_are_told_which(scenario, theirs, others, tmp_path):
    assert LAST_CALL > 3, "calls that are not far apart have other names"
    status, err, errors = run(scenario, 3, tmp_path, worker=WORKER)
    assert status != 0 and sorted(errors) == [0, 1, 2], f"{errors}\n{err}"
    for message in errors.values():
        assert_named(
            message, "FlashMoEError", "gave up in epoch", theirs, others, "every rank must make the same calls"
        )


@pytest.mark.parametrize("what", REFUSED)
def test_a_rank_whose_call_was_refused_may_make_it_again(what, tmp_path):
    status, err, errors = run("refused", 3, tmp_path, what, "again", worker=WORKER)
    assert (status, errors) == (0, {}), err


@pytest.mark.parametrize(("ending", "why"), [
    ("leaves", f"rank {VICTIM} left in epoch 1 because of an error of its own"),
    ("closes", f"rank {VICTIM} closed its layer after 1 calls, and another rank made one more; every rank must make"),
])  # fmt: skip
def test_a_rank_that_leaves_after_its_call_was_refused_is_named_at_once(ending, why, tmp_path):
    """The deadline is longer than `run` waits."""
    status, err, errors = run("refused", 3, tmp_path, "dy", ending, worker=WORKER)
    assert status != 0 and sorted(errors) == [0, 1, 2], f"{errors}\n{err}"
    for rank in {0, 1, 2} - {VICTIM}:
        assert_named(errors[rank], "FlashMoEError", why)


@pytest.mark.parametrize("signum", ["SIGKILL", "SIGSTOP"])
@pytest.mark.parametrize("moment", ["before its blocks", "after its dispatch"])
def test_a_rank_lost_in_a_backward_is_named_by_all_others(moment, signum, tmp_path):
    status, err, errors = run("lost_in_a_backward", 3, tmp_path, moment, signum, worker=WORKER, **{GUARDED: "1"})
    assert status != 0, err
    assert sorted(errors) == [0, 2], f"{errors}\n{err}"
    for rank, message in errors.items():
        expected = "FlashMoEError: " + last_words(moment, rank, 3)
        assert re.fullmatch(expected, message), f"{message!r} is not {expected!r}"
