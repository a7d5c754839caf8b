"""What repairs the weights of a changed model, and whether it helps on held-out text.
Rooms above it may import it: `search` and those above that.
Its files are imported by name: nothing is imported here.
"""
