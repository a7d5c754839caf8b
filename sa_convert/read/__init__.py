"""What a model is, from folders, the Hub, .gguf and pickled files: configuration and headers.
Rooms above it may import it: `models` and those above that.
Its files are imported by name: nothing is imported here.
"""
