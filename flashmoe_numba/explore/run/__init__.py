"""One run of a world on fibers, every access to its memory watched, and what is wrong with it."""
