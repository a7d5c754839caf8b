"""The command line: each file parses, calls one job, and shows what that returns.
No room may import it.
Its files are imported by name: nothing is imported here.
"""
