"""Processes and what they share: who owns what, starting ranks, meeting, shared memory, cores, pools."""
