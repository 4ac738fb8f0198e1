"""Devices and processes: the mesh, how arrays lie on it, and what devices exchange."""
