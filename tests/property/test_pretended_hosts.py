"""Ranks on several hosts, whose puts a network carries late and in any order: the same layer, bit for bit.

Every call is compared with the oracle; regions are poisoned before, and at every release, also of those that come with
a put, all rows that it tells of must be there (`run_world`).
"""

import numpy as np
from backward_cases import assert_gradients_equal, gradients_of
from cases import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended import apart, hosts_of
from worlds import run_world, worlds

from reference import Hosts
from reference.layout import SAVES

fibers = st.fixed_dictionaries(
    {"seed": st.integers(0, 2**32), "lanes": st.integers(1, 3), "preempt": st.sampled_from([0.0, 0.1, 0.5, 1.0])}
)
several = worlds(max_ranks=6).filter(lambda world: world.config.num_ranks > 1)
few = settings(max_examples=max(6, settings().max_examples // 2))


@few
@given(several, st.data(), fibers, st.sampled_from(["sources", "none"]))
def test_a_forward_has_the_bits_of_one_host(world, data, fibers, packing):
    hosts = data.draw(hosts_of(world.config.num_ranks))
    found = run_world(world, apart(hosts, **fibers), packing=packing)
    for (_, y), (_, wanted) in zip(found, run_world(world, backend="fibers", packing=packing), strict=True):
        for rank, part in enumerate(y):
            assert_same_bits(part, wanted[rank], f"{world.config}, {hosts}, rank {rank}")


@few
@given(
    worlds(max_ranks=6, max_calls=2, kinds=True, dtypes=("float64",)).filter(lambda w: w.config.num_ranks > 1),
    st.data(), fibers, st.sampled_from(SAVES), st.integers(0, 99),
)  # fmt: skip
def test_gradients_have_the_bits_of_one_host(world, data, fibers, save, seed):
    hosts = data.draw(hosts_of(world.config.num_ranks))
    one = gradients_of(world, save, seed, make=apart(Hosts.one(world.config.num_ranks)))
    for (call, (x, routing)), (wanted, _) in zip(
        gradients_of(world, save, seed, make=apart(hosts, **fibers)), one, strict=True
    ):
        assert_gradients_equal(call, x, world.weights, world.config, routing)
        for name, array in arrays_in(call.gradients):
            assert_same_bits(array, dict(arrays_in(wanted.gradients))[name], f"{world.config}, {hosts}: {name}")


def arrays_in(value, name=""):
    """(name, array) of all that a value holds, in lists and dataclasses."""
    if isinstance(value, np.ndarray):
        yield name, value
    elif isinstance(value, list):
        for i, each in enumerate(value):
            yield from arrays_in(each, f"{name}[{i}]")
    elif hasattr(value, "__dataclass_fields__"):
        for field in value.__dataclass_fields__:
            yield from arrays_in(getattr(value, field), f"{name}.{field}")
