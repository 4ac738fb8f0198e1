"""Evaluation: masked likelihood, tasks compared with the causal base, fluency, intervals and results files."""
