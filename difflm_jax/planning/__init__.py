"""Estimates of what a job needs before it runs: memory, FLOPs and seconds of a step or a generation on a chip."""
