"""What can be done to a KV group or a layer: a folder each, with the same files.
Rooms above it may import it: `plan` and those above that.
Its files are imported by name: nothing is imported here.
"""
