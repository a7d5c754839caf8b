"""Results as figures.
Rooms above `present` may import it: `sessions` and those above that.
Its files are imported by name: nothing is imported here.
"""
