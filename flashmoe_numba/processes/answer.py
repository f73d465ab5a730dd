"""What a host says when it is asked, in one line: `python -Pm flashmoe_numba.processes.answer`."""

from __future__ import annotations

import json

from .destinations import describe

if __name__ == "__main__":
    print(json.dumps(describe()))
