"""Scores: masked likelihood, tasks beside the causal base, fluency, intervals and results files."""
