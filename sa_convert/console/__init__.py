"""Numbers as people write them, progress, and messages fit for a terminal.
Rooms above it may import it: `domain` and those above that.
Its files are imported by name: nothing is imported here.
"""
