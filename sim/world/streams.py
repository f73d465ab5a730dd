"""Which random numbers are whose: by these, `reference.arrays.stream` draws independent ones from equal seeds.

Numbers below 16 are those of `reference`.
"""

ROUTING, ROUNDING, ZERO_EXPERTS, STRAGGLERS = range(16, 20)
