"""When things happen: an event-driven simulator of distributed Mixture-of-Experts schedules, on any hardware.

Importing it needs NumPy only; the compiled engine (`sim.fast`) needs Numba, the pictures matplotlib.
"""
