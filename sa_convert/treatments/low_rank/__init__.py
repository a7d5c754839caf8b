"""KV groups whose keys are cached in fewer dimensions.
Rooms above `treatments` may import it: `plan` and those above that.
Its files are imported by name: nothing is imported here.
"""
