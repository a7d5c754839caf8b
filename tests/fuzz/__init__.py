"""Damaged input, kills, full disks and races: what `sa-convert` must survive. `python -m fuzz` runs it (`make fuzz`)."""
