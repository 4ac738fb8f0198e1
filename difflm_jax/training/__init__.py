"""Training: the jitted step, the optimiser, the loop over phases, checkpoints, metrics and tracking."""
