"""What every package may use: atomic file writes, locks, the compilation cache, settings, flag help, dtypes."""
