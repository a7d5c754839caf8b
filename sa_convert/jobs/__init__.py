"""What each command does, a file each, whose numbered steps read from top to bottom.
Rooms above it may import it: `commands`.
Its files are imported by name: nothing is imported here.
"""
