"""`python -m flashmoe_numba ...` is `flashmoe ...`."""

import os
import sys

# With -m the current folder comes first, and a user's queue.py or reference.py there would be taken for ours.
if not sys.flags.safe_path and os.path.abspath(sys.path[0]) != os.path.dirname(os.path.dirname(__file__)):
    del sys.path[0]

from .cli import main

sys.exit(main())
