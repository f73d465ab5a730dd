"""What ranks tell each other before each call of a module; with threads as ranks."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from flashmoe_numba import FlashMoEError
from flashmoe_numba.processes.process_group import Duplicate
from flashmoe_numba.torch import rounds
from flashmoe_numba.torch.ranks import Ranks
from flashmoe_numba.torch.replicated import add_up
from flashmoe_numba.torch.rounds import (
    ADDING,
    BACKWARD,
    FORWARD,
    KEPT_FORWARD,
    LAST_MODULE,
    LAST_ROUND,
    MISSING,
    MOST_CALLS,
    Step,
)

STEPS = 300


class Comm(Duplicate):
    def Idup(self):
        return self, self.Ibarrier()


def found(*steps):
    """What `step(ranks)` returns or raises on each rank, all at once."""
    store = dist.HashStore()

    def one(rank):
        ranks = Ranks("of a test", Comm(store, "test", rank, len(steps)), None)
        try:
            return steps[rank](ranks)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(steps)) as pool:
        return list(pool.map(one, range(len(steps))))


def calls(ranks, needs):
    """How many calls of the layer this rank is told to make, for what it needs itself."""
    taken = []
    for module, num_calls in enumerate(needs):
        if (module + ranks.rank_idx) % 7 == 0:
            time.sleep(0.001)
        with ranks.call(module % 3, num_calls) as most:
            taken.append(most)
    return taken


def test_every_rank_makes_as_many_calls_as_the_one_that_needs_most():
    needs = [[1 + (step * (rank + 1)) % 5 for step in range(STEPS)] for rank in range(3)]
    most = [max(of_ranks) for of_ranks in zip(*needs, strict=True)]
    assert found(*(lambda ranks, own=own: calls(ranks, own) for own in needs)) == [most] * 3


def test_a_rank_that_is_done_is_told_what_the_others_call():
    def serve(ranks):
        served = [ranks.next_of_others() for _ in range(STEPS)]
        return served, ranks.next_of_others()

    def work(ranks):
        taken = calls(ranks, range(1, 1 + STEPS))
        return taken, ranks.next_of_others()

    first, last = found(work, serve)
    assert first == (list(range(1, 1 + STEPS)), None)
    assert last == ([(step % 3, 1 + step) for step in range(STEPS)], None)


def test_ranks_that_call_different_modules_are_told_so_at_once():
    def call(module):
        def step(ranks):
            with pytest.raises(FlashMoEError) as caught, ranks.call(module, 1):
                raise AssertionError("it must not come here")
            with pytest.raises(FlashMoEError, match="nothing is computed with these ranks any more"):
                ranks.next_of_others()
            return str(caught.value)

        return step

    said = "rank {} calls module {} of these ranks, rank {} calls module {} of these ranks: " + MISSING
    assert found(call(4), call(5), call(4)) == [said.format(*who) for who in [(0, 4, 1, 5), (1, 5, 0, 4), (2, 4, 1, 5)]]


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        ((FORWARD, KEPT_FORWARD), ("calls module 2 of these ranks", "calls module 2 of these ranks for a backward")),
        (
            (KEPT_FORWARD, BACKWARD),
            ("calls module 2 of these ranks for a backward", "calls module 2 of these ranks backward"),
        ),
    ],
)
def test_ranks_that_call_a_module_in_other_ways_are_told_so(kinds, words):
    def call(kind):
        def step(ranks):
            with ranks.call(2, 1, kind):
                raise AssertionError("it must not come here")

        return step

    first, second = found(*(call(kind) for kind in kinds))
    assert str(first) == f"rank 0 {words[0]}, rank 1 {words[1]}: {MISSING}"
    assert str(second) == f"rank 1 {words[1]}, rank 0 {words[0]}: {MISSING}"


def test_ranks_whose_routers_differ_do_not_mean_the_same_module():
    def calling(*routers):
        def step(ranks):
            for number, router in enumerate(routers):
                for _ in range(2):  # what it is at the first call counts: later it may be trained
                    ranks.mark(number, [torch.zeros(1), torch.tensor(router)], "tensors=('up_proj', 'router: hidden')")
                    with ranks.call(number, 1):
                        router = [0.0]

        return step

    same = [[1.0, 2.0], [3.0]]
    assert found(calling(*same), calling(*same)) == [None, None]
    errors = found(calling(*same), calling(same[0], [3.5]), calling(*same))
    said = "rank {} calls module 1 of these ranks, and rank {} one of this number with another router: every rank must "
    for who, error in zip([(0, 1), (1, 0), (2, 1)], errors, strict=True):
        assert str(error).startswith(said.format(*who))


def test_a_rank_that_left_join_has_no_part_in_a_training():
    def train(ranks):
        with ranks.call(2, 1, KEPT_FORWARD):
            raise AssertionError("it must not come here")

    first, second = found(train, lambda ranks: ranks.next_of_others())
    assert str(first) == f"rank 0 calls module 2 of these ranks for a backward, rank 1 has left join(): {MISSING}"
    assert str(second) == f"rank 1 has left join(), rank 0 calls module 2 of these ranks for a backward: {MISSING}"


def test_ranks_exchange_values_round_after_round():
    def step(ranks):
        seen = []
        for turn in range(STEPS):
            mine = None if (turn + ranks.rank_idx) % 5 == 0 else np.full(3, 100 * turn + ranks.rank_idx, np.float32)
            seen.append([None if values is None else values.tolist() for values in ranks.exchange(mine, 3, np.float32)])
        return seen

    of_ranks = found(step, step, step)
    expected = [
        [None if (turn + rank) % 5 == 0 else [100.0 * turn + rank] * 3 for rank in range(3)] for turn in range(STEPS)
    ]
    assert of_ranks == [expected] * 3


def add(ranks):
    return ranks.exchange(None, 1, np.float32)


def test_a_rank_that_adds_nothing_up_is_told_of():
    adding, calling = found(add, lambda ranks: calls(ranks, [1]))
    assert str(adding) == f"rank 0 adds up gradients, rank 1 calls module 0 of these ranks: {MISSING}"
    assert str(calling) == f"rank 1 calls module 0 of these ranks, rank 0 adds up gradients: {MISSING}"


def gradients_of(*frozen):
    """On each rank: gradients of two matrices after they were added up, of which it has frozen those of this name."""

    def step(name):
        def of_rank(ranks):
            model = nn.ModuleDict({key: nn.Linear(3, 2, bias=False) for key in ("a", "b")})
            model[name].requires_grad_(False)
            for number, key in enumerate(("a", "b")):
                if key != name:
                    model[key].weight.grad = torch.full((2, 3), 10.0 * number + ranks.rank_idx + 1)
            add_up(model, ranks, False)
            return [None if one.weight.grad is None else one.weight.grad[0, 0].item() for one in model.values()]

        return of_rank

    return found(*map(step, frozen))


def test_ranks_may_have_frozen_other_parameters():
    assert gradients_of("a", "b") == [[2.0, 11.0]] * 2
    assert gradients_of("b", "b", "b") == [[6.0, None]] * 3


def test_ranks_that_add_up_other_parameters_are_told_so():
    def step(*shapes):
        model = nn.ParameterList([nn.Parameter(torch.ones(shape)) for shape in shapes])
        for parameter in model:
            parameter.grad = torch.ones_like(parameter)
        return lambda ranks: add_up(model, ranks, False)

    first, second = found(step((3,), (2, 3)), step((3,), (3, 2)))
    said = "rank {} adds up gradients, and rank {} those of another parameter: every rank must have the same ones"
    assert str(first).startswith(said.format(0, 1)) and str(second).startswith(said.format(1, 0))


def test_adding_is_no_call(monkeypatch):
    monkeypatch.setattr(rounds, "DEADLINE_S", 0.2)
    error, _ = found(*(lambda ranks, own=own: [calls(ranks, [1]), *(add(ranks) for _ in range(own))] for own in (2, 1)))
    assert str(error).startswith("rank 0 gave up at call 1: it adds up gradients, rank 1 did not come within 0.2 s")


def test_the_largest_numbers_fit_in_a_word():
    largest = Step(ADDING, LAST_MODULE, MOST_CALLS)

    def step(ranks):
        ranks._round = LAST_ROUND - 1
        told = ranks.tell(largest)
        with pytest.raises(FlashMoEError, match=f"these ranks have met {LAST_ROUND} times, which is the most"):
            ranks.tell(largest)
        return told

    assert found(step, step) == [[largest] * 2] * 2


def test_a_rank_that_does_not_come_is_named_within_the_deadline(monkeypatch):
    monkeypatch.setattr(rounds, "DEADLINE_S", 0.2)
    first, _, third = found(*(lambda ranks, own=own: calls(ranks, [1] * own) for own in (2, 1, 2)))
    assert "rank 1 did not come within 0.2 s" in str(third)
    assert str(first) == (
        "rank 0 gave up at call 2: it calls module 1 of these ranks, rank 1 did not come within 0.2 s: "
        f"{MISSING}, or it was late, or is gone"
    )


def test_a_rank_that_left_is_not_waited_for():
    came = threading.Barrier(2)

    def leave(ranks):
        calls(ranks, [1])
        came.wait()
        ranks.end(ZeroDivisionError("planted"))

    def wait(ranks):
        calls(ranks, [1])
        came.wait()
        return calls(ranks, [1])

    error, _ = found(wait, leave)
    assert str(error) == (
        "rank 0 gave up at call 2: it calls module 0 of these ranks, rank 1 left because of an error of its own"
    )


@pytest.mark.parametrize(("unused", "can"), [((True, True), True), ((True, False), False), ((False, True), False)])
def test_a_layer_goes_when_no_rank_uses_it(unused, can):
    assert found(*(lambda ranks, own=own: ranks.all_can_release(own) for own in unused)) == [can, can]


def test_releasing_and_calling_at_once_is_an_error_on_both():
    errors = found(lambda ranks: ranks.all_can_release(True), lambda ranks: calls(ranks, [1]))
    assert str(errors[0]) == f"rank 0 releases layers, rank 1 calls module 0 of these ranks: {MISSING}"
    assert "rank 1 calls module 0 of these ranks, rank 0 releases layers" in str(errors[1])


def test_a_layer_is_made_when_all_ranks_have_come_however_late(monkeypatch):
    monkeypatch.setattr(rounds, "DEADLINE_S", 0.05)

    def late(ranks):
        time.sleep(0.2)
        return ranks.meet_to_make()

    assert found(late, Ranks.meet_to_make) == [None, None]


def test_a_rank_that_makes_no_layer_is_told_of_at_once():
    calling, making = found(lambda ranks: calls(ranks, [1]), Ranks.meet_to_make)
    assert str(calling) == f"rank 0 calls module 0 of these ranks, rank 1 makes a layer: {MISSING}"
    assert str(making) == f"rank 1 makes a layer, rank 0 calls module 0 of these ranks: {MISSING}"
    left, making = found(lambda ranks: ranks.end("planted"), Ranks.meet_to_make)
    assert left is None and str(making).endswith("rank 0 left because of an error of its own")


@pytest.mark.parametrize(
    ("step", "does"),
    [(lambda ranks: ranks.all_can_release(True), "releases layers"), (Ranks.meet_to_make, "makes a layer")],
)
def test_a_rank_that_is_done_serves_calls_only(step, does):
    done, other = found(Ranks.next_of_others, step)
    assert str(done) == f"rank 0 has left join(), rank 1 {does}: {MISSING}"
    assert str(other) == f"rank 1 {does}, rank 0 has left join(): {MISSING}"


def test_a_rank_that_is_done_is_told_that_others_call_different_modules():
    done, *_ = found(Ranks.next_of_others, *(lambda ranks, m=m: calls(ranks, [1] * m) for m in (1, 1)), call_second)
    assert str(done) == (f"rank 1 calls module 0 of these ranks, rank 3 calls module 1 of these ranks: {MISSING}")


def call_second(ranks):
    with ranks.call(1, 1):
        raise AssertionError("it must not come here")


def test_modules_have_numbers_in_the_order_in_which_they_come():
    def step(ranks):
        modules = [nn.Identity() for _ in range(4)]
        numbers = [ranks.number_of(module, ["a path"], "text") for module in modules]
        assert ranks.member(2) == (modules[2], ["a path"], "text")
        del modules[1]
        with pytest.raises(FlashMoEError, match="rank 0 has no module 1 of these ranks, which others call"):
            ranks.member(1)
        with pytest.raises(FlashMoEError, match="rank 0 has no module 4 of these ranks, which others call"):
            ranks.member(4)
        return [*numbers, ranks.number_of(modules[1], [], ""), ranks.number_of(nn.Identity(), [], "")]

    assert found(step) == [[0, 1, 2, 3, 2, 4]]


def test_more_calls_than_words_can_tell_are_an_error():
    (error,) = found(lambda ranks: calls(ranks, [1 << 14]))
    assert str(error).startswith("at most 16383 calls for one of a module")
