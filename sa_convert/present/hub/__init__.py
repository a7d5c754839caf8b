"""Whether a folder is a whole conversion, and its upload.
Rooms above `present` may import it: `sessions` and those above that.
Its files are imported by name: nothing is imported here.
"""
