"""Damaged input, kills, full disks and races: what `sa-convert` must survive. `make fuzz` runs it."""
