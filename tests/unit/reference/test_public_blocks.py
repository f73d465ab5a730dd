"""Layers made of public blocks' own configs and tensors, against what the blocks made of the same tokens.

The records (tests/golden/records) are what the blocks' own code computed, in float64 and float32.
"""

import json

import numpy as np
import pytest
from golden.checks import assert_same, changes, without
from golden.record import RECORDS, Record

from reference.families import family_names, read_family

CASES = sorted(path.stem for path in RECORDS.glob("*.npz"))


@pytest.fixture(scope="module", params=CASES)
def record(request):
    return Record.read(RECORDS / f"{request.param}.npz")


def test_every_family_that_is_a_layer_has_a_record():
    families = {name for name in family_names() if read_family(name).sections["router"]}
    assert families == {name for name in CASES if "." not in name}


def test_a_layer_computes_what_the_block_does(record):
    assert_same(record)


def test_what_a_kind_says_is_seen_in_the_results(record):
    """A case that would pass without a bias, a limit or a group proves nothing of it."""
    config, weights = record.layer()
    unseen = [name for name, less in without(config) if not changes(record, config, less, weights)]
    assert unseen == ([] if config.router_kind.num_groups == 1 else UNSEEN.get(record.family, [])), unseen


# Experts of closed groups are chosen in exact ties with one another only, where a block's choice is arbitrary.
UNSEEN = {"axk2": ["group_fill"]}


def test_a_record_says_what_made_it(record):
    about = json.loads(record.about)
    assert about["transformers"] == read_family(record.family).sections["tested"]["transformers"]
    assert np.isfinite(record.y).all() and np.isfinite(record.y32).all()
