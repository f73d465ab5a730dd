"""Simulations as one page for a browser, which needs nothing else: what is gathered of each, how it is written."""
