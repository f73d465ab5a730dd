"""How a rank ends all of them when one may be lost, which MPI's own ways wait for.

mpirun ends the others when a rank was ended by a signal, or aborts. After a rank that has just left it waits for them:
for ever, if they stand still, or if their host has lost its power.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any, NoReturn

LAST_WORDS_S = 0.5  # for messages on their way, to mpirun and from it


def end_all_ranks(comm: Any, code: int) -> NoReturn:
    """End this process and tell mpirun to end all other ranks; waits for nobody.

    Args:
        comm: an mpi4py communicator of all ranks.
        code: the exit status.
    """
    sys.stdout.flush()
    threading.Thread(target=comm.Abort, args=(code,), daemon=True).start()  # a lost rank may hold up MPI for ever
    time.sleep(LAST_WORDS_S)
    os._exit(code)
