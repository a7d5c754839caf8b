"""How good and how fast a model is: `quality` and `speed`.
Rooms above it may import it: `observe` and those above that.
Its files are imported by name: nothing is imported here.
"""
