"""Layers in which one linear map takes the place of attention.
Rooms above `treatments` may import it: `plan` and those above that.
Its files are imported by name: nothing is imported here.
"""
