"""A rank ends all of them, whether MPI comes back or not."""

import subprocess
import sys

import pytest

from flashmoe_numba.processes.ending import LAST_WORDS_S

SCRIPT = """
import time
from flashmoe_numba.processes.ending import end_all_ranks

class Comm:
    def Abort(self, code):
        print(f"abort {code}", flush=True)
        time.sleep(%g)

print("said before", end=" ")
end_all_ranks(Comm(), 7)
"""


@pytest.mark.parametrize("abort_s", [0, 1000 * LAST_WORDS_S])
def test_a_rank_that_ends_all_tells_mpi_and_does_not_wait_for_it(abort_s):
    done = subprocess.run([sys.executable, "-c", SCRIPT % abort_s], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (7, "said before abort 7\n", "")
