"""Many simulations: grids and their sweeps, figures of them, and what would make one faster."""
