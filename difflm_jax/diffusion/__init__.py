"""Masked diffusion: corruption, objective, schedules, confidences, the sampler. Knows models, and no files."""
