"""The bytes of a converted model: edits of tensors, shards, configuration, carried files.
Rooms above it may import it: `treatments` and those above that.
Its files are imported by name: nothing is imported here.
"""
