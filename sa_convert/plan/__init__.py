"""What is done to a model: recipes are read, and everything is decided and checked from headers.
Rooms above it may import it: `present` and those above that.
Its files are imported by name: nothing is imported here.
"""
