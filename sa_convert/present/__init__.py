"""What people see of results: `terminal`, `files`, `charts`, and the `hub`.
Rooms above it may import it: `sessions` and those above that.
Its files are imported by name: nothing is imported here.
"""
