"""A function to compile and cache as the kernel is, but in a moment; run as a program by the cache's tests."""

import sys
import time
from pathlib import Path

import numpy as np

from flashmoe_numba.device import fetch_add, jit
from flashmoe_numba.device.compilation import compile_for


@jit(entry=True)
def add_up(words, value):
    for i in range(words.size):
        fetch_add(words, i, value)


def main(start_at: str) -> None:
    """Compile or load it at the moment `start_at` (a file that appears), use it, say how it came."""
    print("ready", flush=True)
    while not Path(start_at).exists():
        time.sleep(0.001)
    words = np.arange(3)
    compile_for(add_up, (words, 5))
    add_up(words, 5)
    hits = sum(add_up._cache_hits.values()) if hasattr(add_up, "_cache_hits") else -1
    print(words.tolist(), "loaded" if hits else "compiled")


if __name__ == "__main__":
    main(sys.argv[1])
