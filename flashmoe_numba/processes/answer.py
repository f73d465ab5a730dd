"""What a host says when it is asked: `python -Pm flashmoe_numba.processes.answer`.

In one line what it is, and where it listens; then, when it is told where the others do, in another line which of them
it does not reach. It stays until it hears no more.
"""

from __future__ import annotations

import json
import os
import sys
import threading

from .description import describe
from .reaching import Listener, not_reached

STAYS_S = 90.0  # whoever asked may be gone without a word

if __name__ == "__main__":
    limit = threading.Timer(STAYS_S, os._exit, [1])
    limit.daemon = True
    limit.start()
    print(json.dumps(describe() | {"place": Listener().place}), flush=True)
    if others := sys.stdin.readline():
        print(json.dumps(not_reached(json.loads(others))), flush=True)
        sys.stdin.read()
