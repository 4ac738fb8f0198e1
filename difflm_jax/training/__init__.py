"""Training: the mesh, the jitted step, the optimiser, the loop over phases, metrics and tracking."""
