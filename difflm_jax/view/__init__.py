"""Displays of denoising, answers and tables, in a terminal and as a page. Nothing here runs a model."""
