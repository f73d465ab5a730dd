"""The GPU alone: its driver, its memory and streams, launches.

Not named `cuda`: numba-cuda takes over the import of every module in whose full name it finds "numba.cuda".
"""
