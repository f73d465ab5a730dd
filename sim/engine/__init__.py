"""A graph of tasks in time: `graph` is what is run, `plain` says what that means, and `compiled` does it fast."""
