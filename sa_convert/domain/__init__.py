"""Plain frozen data that the rooms hand to each other.
Rooms above it may import it: `output` and those above that.
Its files are imported by name: nothing is imported here.
"""
