"""Which fiber goes next: strategies by seed, given schedules, or the tree of all choices there are."""
