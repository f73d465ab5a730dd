"""The kernel on NVIDIA GPUs: how it is built (no GPU needed), and the GPU's memory, streams and launches.

Not named `cuda`: numba-cuda takes over the import of every module in whose full name it finds "numba.cuda".
"""
