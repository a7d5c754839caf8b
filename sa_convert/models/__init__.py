"""Models that run: opened, placed on devices, asked to predict.
Rooms above it may import it: `rewrite` and those above that.
Its files are imported by name: nothing is imported here.
"""
