"""The files that users receive inside their checkpoint; copied from here as they are.

Nothing is imported here, so that header-only work can read the family table without torch.
"""
