"""Utilities for every package: atomic file writes, locks, compiled programs, settings, flag help, progress, dtypes."""
