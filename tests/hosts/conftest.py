"""Hosts for tests."""

import os

import pytest
from running_on_hosts import Running, namespaces, require_hosts


@pytest.fixture
def hosts_of():
    """A maker of hosts, which are gone when the test is over."""
    require_hosts(bool(os.environ.get("CI")))
    made = []

    def make(num_hosts):
        made.append(Running(namespaces.Hosts(num_hosts)))
        return made[-1]

    yield make
    for hosts in made:
        hosts.close()
