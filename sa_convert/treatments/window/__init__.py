"""KV groups that see the first tokens of a sequence and the most recent ones.
Rooms above `treatments` may import it: `plan` and those above that.
Its files are imported by name: nothing is imported here.
"""
