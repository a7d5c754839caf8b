"""Text that calibrates, and text that validates; no document does both.
Rooms above it may import it: `families` and those above that.
Its files are imported by name: nothing is imported here.
"""
