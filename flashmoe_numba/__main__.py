"""`python -m flashmoe_numba ...` is `flashmoe ...`."""

import sys

from .cli import main

sys.exit(main())
