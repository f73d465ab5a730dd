"""Simulated beside measured: published tables, what of them the simulator can express, and how far off it is.

`tables` reads the rows, `rules` says which policy and which quantity a row is about, `cases` makes worlds of them,
`compare` runs them and groups the errors, `fit` finds the one rate per policy and GPU.
"""
