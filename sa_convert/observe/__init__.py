"""What a base model does while it runs: probed, replayed, and changed in memory for a while.
Rooms above it may import it: `heal` and those above that.
Its files are imported by name: nothing is imported here.
"""
