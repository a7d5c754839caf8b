"""Query heads that use the attention of heads in earlier layers.
Rooms above `treatments` may import it: `plan` and those above that.
Its files are imported by name: nothing is imported here.
"""
