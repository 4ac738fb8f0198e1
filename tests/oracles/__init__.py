"""Independent references in torch, written from the papers' formulas."""
