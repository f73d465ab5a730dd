"""Layers on several hosts: what they give when ranks, hosts or cables are lost, and whether anything grows.

For 34_lost_hosts.py, 35_hosts_soak.py and tests/hosts. `namespaces.py` makes the hosts, `calls.py` is what is computed,
`started.py` starts ranks there, `stacks.py` tells what they are at, where they should have gone on. `rank.py` is a rank
of a trial, `faults.py` what is done to it and to whom, `trial.py` one run as its starter sees it, with what every rank
has to say at its end. `soaking.py` is a rank of a soak, `held.py` what it holds, `soak.py` one soak as its starter sees
it.
"""
