"""One rank of the tests in test_layers_on_hosts.py: scenarios of tests/mpi, on the hosts that there are."""

import sys
from pathlib import Path

import hosts_worker
import layer_worker
import training_worker

if __name__ == "__main__":
    scenarios = vars(layer_worker) | vars(training_worker) | vars(hosts_worker)
    layer_worker.main(scenarios, sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
