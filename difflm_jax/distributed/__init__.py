"""Devices and processes: the mesh, how arrays are sharded over it, and what devices exchange."""
