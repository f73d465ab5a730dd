"""Ranks as forked processes that lose one of themselves at a random moment (31_lost_ranks.py, test_lost_ranks.py).

`world.py` is what they compute, `memory.py` what they share, `rank.py` a rank, `run.py` one run as the parent sees it,
`faults.py` what is done to a rank, and `verdict.py` what every rank has to say then.
"""
