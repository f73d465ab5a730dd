"""One rank of the tests in test_training_mpi.py, as in layer_worker.py."""

import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from backward_cases import arrays_of
from cases import assert_same_bits, bits, random_tokens, tiny_config
from kinds import NORMED
from layer_worker import DEADLINE_S, main, make_config, make_weights
from losing import VICTIM, lose

from flashmoe_numba import FlashMoE
from reference import Weights
from reference.layout import SAVES

NUM_GLOBAL = 24
LAYERS = {"float32": {}, "float64": {}, "normed": dict(expert=NORMED)}


def make_layer(num_ranks, name):
    """(config, weights): the same layer and tokens, on any number of ranks."""
    dtype = name if name == "float64" else "float32"
    sizes = dict(num_tokens=NUM_GLOBAL, num_experts=24, num_topk=3)  # of 1, 2, 4, 6 and 8 ranks
    config = tiny_config(num_ranks=num_ranks, **sizes, dtype=dtype, **LAYERS[name])
    return config, Weights.random(config, seed=4, bias=True)


def tokens(config):
    """(x, dy) of all ranks, one behind the other."""
    return random_tokens(config, [NUM_GLOBAL], 1)[0], random_tokens(config, [NUM_GLOBAL], 2)[0]


def gradients(comm, folder):
    """Two calls that are kept at the same time, and one sum of gradients, for each of SAVES."""
    saved = {}
    for name in LAYERS:
        config, weights = make_layer(comm.size, name)
        ends = np.linspace(0, NUM_GLOBAL, comm.size + 1).astype(int) ** 2 // NUM_GLOBAL  # uneven
        own = slice(ends[comm.rank], ends[comm.rank + 1])
        x, dy = (part[own] for part in tokens(config))
        for save in SAVES:
            with FlashMoE(config, weights, comm=comm, save=save, num_processors=1 + comm.rank % 3) as layer:
                first, second = (layer.forward(part)[1] for part in (x, -x))
                none = layer.no_gradients() if save == SAVES[0] else None  # sums begin as where there are none
                found = layer.backward(second, dy, into=layer.backward(first, dy, into=none))
            arrays = {"x": found.x, "topk_weights": found.topk_weights, "logits": found.logits}
            arrays |= arrays_of(found.weights)
            saved |= {f"{name} {save} {key}": bits(array) for key, array in arrays.items()}
    np.savez(folder / f"rank{comm.rank}.npz", **saved)


def other_calls(comm, folder):
    """One rank makes a forward where the others make a backward."""
    config = make_config(comm.size)
    x = random_tokens(config)[comm.rank]
    with FlashMoE(config, make_weights(config), comm=comm, save="rows", deadline_s=100) as layer:
        _, saved = layer.forward(x)
        if comm.rank == VICTIM:
            layer.forward(x)
        layer.backward(saved, x)


def other_handles(comm, folder):
    """One rank takes another call that it kept than the others do."""
    config = make_config(comm.size)
    x = random_tokens(config)[comm.rank]
    with FlashMoE(config, make_weights(config), comm=comm, save="nothing", deadline_s=100) as layer:
        saved = [layer.forward(x)[1] for _ in range(3)]
        layer.backward(saved[2 if comm.rank == VICTIM else 0], x)


REFUSED = {
    "tokens": lambda layer, saved, other, x: layer.forward(x[:, 1:]),
    "dy": lambda layer, saved, other, x: layer.backward(saved, x[1:]),
    "another layer's call": lambda layer, saved, other, x: layer.backward(other, x),
}


def refused(comm, folder, what, ending):
    """One rank's call is refused before it begins. It makes it "again", or "leaves" with its error, or "closes"."""
    config = make_config(comm.size)
    weights, how = make_weights(config), dict(comm=comm, save="rows", deadline_s=1000)
    x = random_tokens(config, [3] * comm.size)[comm.rank]
    with FlashMoE(config, weights, **how) as one, FlashMoE(config, weights, **how) as layer:
        other, first = (one.forward(x)[1] for _ in range(2))
        expected = one.backward(first, x).x
        _, saved = layer.forward(x)
        if comm.rank == VICTIM:
            with pytest.raises(ValueError, match="must") as caught:
                REFUSED[what](layer, saved, other, x)
            if ending == "leaves":
                raise caught.value
            if ending == "closes":
                layer.close()
        assert_same_bits(layer.backward(saved, x).x, expected)


def lost_in_a_backward(comm, folder, moment, signum):
    """SIGKILL or SIGSTOP in call 4, the second backward."""
    config = make_config(comm.size)
    x = random_tokens(config)[comm.rank]
    lose(moment, folder, signal.Signals[signum])
    layer = FlashMoE(config, make_weights(config), comm=comm, save="rows+up", deadline_s=DEADLINE_S)
    while True:
        _, saved = layer.forward(x)
        layer.backward(saved, x)


if __name__ == "__main__":
    main(globals(), sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
