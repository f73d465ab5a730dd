"""Layers on several hosts that lose ranks, hosts or cables at a random moment (34_lost_hosts.py, tests/hosts).

`namespaces.py` makes the hosts, `calls.py` is what is computed, `rank.py` a rank, `faults.py` what is done to it and to
whom, `trial.py` one run as its starter sees it, with what every rank has to say at its end.
"""
