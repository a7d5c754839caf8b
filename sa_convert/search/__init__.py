"""Which plan costs least: costs of every unit, rounds of choices, budgets and limits.
Rooms above it may import it: `jobs` and those above that.
Its files are imported by name: nothing is imported here.
"""
