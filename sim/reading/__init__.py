"""What a simulation says: reports, idle causes, explanations, lanes, traces, pictures."""
