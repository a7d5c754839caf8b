"""Results as files: report, card, tables, the folders of `analyze` and `bench`.
Rooms above `present` may import it: `sessions` and those above that.
Its files are imported by name: nothing is imported here.
"""
