"""What schedules are made of: a `Draft` with a machine's resources, row blocks, costs, hops, rates, knobs."""
