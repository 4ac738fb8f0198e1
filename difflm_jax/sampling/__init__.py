"""Generation: options, schedules, confidences, the jitted loop, caches, the host side. Knows models, and no files."""
