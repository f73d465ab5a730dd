"""The layer as users call it: its arguments checked, its ranks set up, its calls."""
