"""How is a conversation kept between turns? Its cache in a file, and moved on when the context is full.
Rooms above it may import it: `measure` and those above that.
Its files are imported by name: nothing is imported here.
"""
