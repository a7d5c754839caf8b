"""Folders that appear whole or not at all: staging, signals, what may be replaced.
Rooms above it may import it: `texts` and those above that.
Its files are imported by name: nothing is imported here.
"""
