"""What experiments/hosts says of a soak: wrong results, calls that were not made, and all that grows are told."""

import json
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "experiments"))
from hosts import soak
from hosts.calls import BACKWARD_EVERY, DIGEST_BYTES, Work, expected, one_call, soak_layers, soak_works
from hosts.held import CHANCE_BLOCKS, CHANCE_KIB, NOTHING, Held, complaints, held, most
from hosts.soak import Soak
from hosts.started import Started

WORK = Work(num_ranks=2)
LAYERS = [(WORK, range(3)), (WORK, range(3, 5))]


class Ended(Started):
    """Two ranks that have left files in a folder."""

    def __init__(self, folder, results, lines):
        self.folder, self.num_ranks = folder, 2
        for rank in range(2):
            (folder / f"{rank}.digests").write_bytes(b"".join(of_call[rank] for of_call in results))
            (folder / f"{rank}.held").write_text("".join(json.dumps(line) + "\n" for line in lines))


def results_of(count):
    return [[bytes([call, rank]) * (DIGEST_BYTES // 2) for rank in range(2)] for call in range(count)]


@pytest.fixture
def compared(tmp_path, monkeypatch):
    """What is found in the results of two ranks."""
    monkeypatch.setattr(soak, "expected", lambda work, first: iter(results_of(5)[first:]))

    def of(results):
        found = Soak()
        soak.compare(Ended(tmp_path, results, []), LAYERS, found)
        return found

    return of


def test_results_of_all_layers_are_compared(compared):
    results = results_of(5)
    assert (compared(results).calls, compared(results).wrong, compared(results).problems) == (5, 0, [])
    results[1][0] = results[4][1] = bytes(DIGEST_BYTES)
    found = compared(results)
    assert (found.calls, found.wrong) == (5, 2)
    assert found.problems == ["2 results of ranks are not those of one process"]


def test_calls_that_were_not_made_are_told(compared):
    assert compared(results_of(4)).problems == ["4 calls of 5 were made"]


def test_growth_is_told_by_rounds_and_within_layers(tmp_path):
    rounds = [Held(100, 90, 9, 50, 9, 3, 0), Held(120, 99, 0, 51, 9, 3, 0), Held(900, 92, 12, 54, 11, 3, 4)]
    lines = []
    for number, at_end in enumerate(rounds):
        lines.append({"round": number, "grown": NOTHING._replace(allocated_kib=70 - number)})
        lines.append({"round": number, "held": at_end})
    found = Soak(calls=200)
    soak.look_for_growth(Ended(tmp_path, [], lines), 10, found)
    assert found.kept == Held(800, 2, 3, 4, 2, 0, 4) and found.in_layer.allocated_kib == 69  # not the first round's
    assert found.ends_kib == [50, 51, 54]
    assert [text.split()[0] for text in found.problems] == ["blocks", "descriptors", "shared_kib"]
    assert found.row()["layer_kib"] == 69 and found.row()["problems"] == 3


def test_what_grows_by_chance_is_no_complaint():
    by_chance = Held(CHANCE_BLOCKS, CHANCE_KIB, CHANCE_KIB + 1000, CHANCE_KIB, 0, 0, 0)
    assert complaints(by_chance, early_kib=1000) == []
    grown = Held(*(amount + 1 for amount in by_chance))
    assert [text.split()[0] for text in complaints(grown, early_kib=1000)] == list(Held._fields)


def test_the_most_that_grew_is_told_of_each_thing():
    up = Held(*range(7))
    assert most([up, Held(*reversed(up))]) == Held(6, 5, 4, 3, 4, 5, 6) and most([]) == NOTHING


def test_held_counts_what_there_is(tmp_path):
    before, done = held(), threading.Event()
    thread = threading.Thread(target=done.wait)
    with (tmp_path / "file").open("w"):
        thread.start()
        kept = [[] for _ in range(10_000)], np.ones(5_000_000)
        grown = held().since(before)
    done.set()
    thread.join()
    assert grown.threads == 1 and grown.descriptors >= 1 and grown.blocks >= len(kept[0])
    assert grown.resident_kib > 30_000 and grown.allocated_kib > 39_000 and len(kept[1]) == 5_000_000


def test_rounds_go_through_all_types_and_calls_follow_each_other():
    rounds = list(soak_layers(8, rounds=3, calls=1000))
    assert len(rounds) == 3 and all(len(layers) == len(soak_works(8)) for layers in rounds)
    numbers = [numbers for layers in rounds for _, numbers in layers]
    assert [call for part in numbers for call in part] == list(range(numbers[-1].stop)) and numbers[-1].stop >= 1000
    assert {work.dtype for work, _ in rounds[0]} == {"float64", "float32", "float16", "bfloat16"}
    large = rounds[0][-1][0].config
    packet_bytes = large.num_tokens * large.num_topk // large.num_ranks * large.hidden * large.numpy_dtype.itemsize
    assert packet_bytes > 2 * 2**20


def test_ranks_of_one_process_have_calls_and_backwards_each():
    with WORK.make() as layer:
        found = [one_call(layer, WORK, call) for call in range(BACKWARD_EVERY + 1)]
    assert all(len(of_call) == 2 for of_call in found)
    assert [of_call for of_call, _ in zip(expected(WORK, 1), range(BACKWARD_EVERY), strict=False)] == found[1:]
