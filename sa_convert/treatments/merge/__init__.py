"""Layers with fewer KV groups, which more query heads read.
Rooms above `treatments` may import it: `plan` and those above that.
Its files are imported by name: nothing is imported here.
"""
