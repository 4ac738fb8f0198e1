"""Generation: options, schedules, confidences, the jitted loop, caches, the host side. Uses models, reads no files."""
