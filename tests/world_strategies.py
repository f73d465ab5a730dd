"""Whole worlds for the explorer, drawn: a layer, its calls with their token counts and routings, and a schedule.

Beside them one example for each case that matters (`watched_runs.CASES`). All is a value (`Search` and a seed), so
what Hypothesis shrinks to can be copied into a test.
"""

from dataclasses import replace

from hypothesis import strategies as st
from worlds import configs

from flashmoe_numba.explore.choose.strategies import STRATEGIES
from flashmoe_numba.explore.run.spec import GivenCall, WorldSpec
from flashmoe_numba.explore.search import Search
from reference import MoEConfig
from reference.layout import SAVES
from reference.runs import PACKINGS

TINY = dict(
    num_ranks=2, num_tokens=3, hidden=3, ffn=3, num_experts=4, num_topk=2, gated=True, activation="silu",
    tile_m=2, tile_m_min=2, tile_n=2, token_block=2,
)  # fmt: skip


@st.composite
def routings(draw, config, counts):
    """A routing from outside: each rank's tokens go through a pool of experts, so many on at each token.

    A small pool leaves some ranks without rows, and a stride of 0 sends all tokens of a rank to the same experts. In
    the place of one expert there may be no choice (-1).
    """
    experts = st.sampled_from([*range(config.num_choices), -1])
    pool = draw(st.lists(experts, min_size=config.num_topk, unique=True))
    stride, firsts = draw(st.integers(0, 2)), [draw(st.integers(0, len(pool) - 1)) for _ in counts]
    return tuple(
        tuple(
            tuple(pool[(first + token * stride + j) % len(pool)] for j in range(config.num_topk))
            for token in range(count)
        )
        for first, count in zip(firsts, counts, strict=True)
    )


@st.composite
def given_calls(draw, config):
    most = config.num_tokens
    one = st.sampled_from([1, most, most, 0]) | st.integers(0, most)
    counts = tuple(draw(st.lists(one, min_size=config.num_ranks, max_size=config.num_ranks)))
    return GivenCall(counts, draw(st.none() | routings(config, counts)))


@st.composite
def specs(draw, max_ranks=4, max_calls=3, max_tokens=4, **fixed):
    num_tokens, tile_m_min = draw(st.integers(1, max_tokens)), draw(st.integers(1, 3))
    sizes = dict(
        tile_m_min=tile_m_min,
        tile_m=tile_m_min * draw(st.sampled_from([1, 1, 2])),
        num_tokens=num_tokens,
        capacity=draw(st.none() | st.integers(1, (num_tokens + 1) // 2)),
        hidden=draw(st.sampled_from([1, 3, 5])),
        ffn=draw(st.sampled_from([1, 3, 4])),
    )
    config = draw(configs(max_ranks=max_ranks, **(sizes | fixed)))
    calls = draw(st.lists(given_calls(config), min_size=1, max_size=max_calls))
    hosts = min(draw(st.sampled_from([1, 1, 2, 3])), config.num_ranks)
    return WorldSpec(
        config=config,
        num_processors=draw(st.integers(1, 3)),
        lanes=draw(st.integers(1, 3)),
        epochs=len(calls),
        data_seed=draw(st.integers(0, 9)),
        given=tuple(calls),
        packing=draw(st.sampled_from(PACKINGS)),
        hosts=hosts,
        grid=hosts == 1 and draw(st.sampled_from([False, False, True])),
    )


@st.composite
def programs(draw, num_calls):
    """Forwards, and backwards of those that wait for one, in any order; the first call is a forward."""
    program = []
    for call in range(num_calls):
        waiting = [number for number in range(1, call + 1) if not program[number - 1] and number not in program]
        program.append(draw(st.sampled_from([*waiting, 0])))
    return tuple(program)


@st.composite
def specs_of_programs(draw, **options):
    """The same layers and calls, some with a norm of results, of which some calls are backwards, of float64 so that all
    gradients are compared.
    """
    spec = draw(specs(dtypes=("float64",), norms=True, **options))
    return replace(
        spec,
        program=draw(programs(spec.epochs)),
        save=draw(st.sampled_from(SAVES)),
        logits_gradient=draw(st.booleans()),
        frozen_experts=draw(st.sampled_from([False, False, True])),
        frozen_router=draw(st.sampled_from([False, False, True])),
    )


def schedules():
    """What of a search does not change the world, and the seed."""
    choices = dict(strategy=st.sampled_from(STRATEGIES), weak=st.booleans(), depth=st.integers(1, 4))
    return st.tuples(st.fixed_dictionaries(choices), st.integers(0, 999))


@st.composite
def explored_worlds(draw, **options):
    """(search, seed): one run."""
    spec, (schedule, seed) = draw(specs(**options)), draw(schedules())
    return Search(spec=spec, **schedule), seed


# ---- examples


def search(*calls, strategy="random", num_processors=2, lanes=1, **changes):
    config = MoEConfig(**(TINY | changes))
    world = WorldSpec(config=config, num_processors=num_processors, lanes=lanes, epochs=len(calls), given=calls)
    return Search(spec=world, strategy=strategy)


def to(experts, *counts):
    """A call in which all tokens go to the same experts."""
    return GivenCall(counts, tuple((experts,) * count for count in counts))


EXAMPLES = {
    "a rank sends nothing": search(GivenCall((0, 2)), lanes=2),
    "a rank receives nothing": search(to((1, 0), 2, 1)),
    "nobody sends anything": search(GivenCall((0, 0)), GivenCall((0, 0)), num_processors=1),
    "token counts change": search(*map(GivenCall, [(3, 0), (0, 3), (1, 3), (3, 3)])),
    "all tokens go to one expert": search(to((2,), 3, 3), num_topk=1, lanes=3),
    "pairs are dropped": search(to((0, 3), 2, 2), capacity=1),
    "a token loses all its experts": search(to((0, 3), 3, 3), capacity=1, token_block=1),
    "a packet has several row tiles": search(to((0, 3), 3, 3), num_processors=3),
    "a row tile has rows of several sources": search(to((1, 2), 1, 2), to((0, 3), 3, 3), lanes=2),
    "a rest is cut with the last packet": search(to((1, 2), 2, 1), num_processors=1),
    "a rest is cut for idle processors": search(to((1, 2), 1, 2), num_processors=3),
    "a rank is a call ahead of another": search(to((3, 2), 0, 2), GivenCall((3, 1)), num_processors=1),
    "two calls tell of an empty packet": search(
        to((3, 2), 0, 2), GivenCall((3, 1)), to((3, 2), 0, 1), strategy="pct", num_processors=1
    ),
}
