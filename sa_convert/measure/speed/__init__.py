"""How fast a model is: two models in processes of their own, timed in turns.
Rooms above `measure` may import it: `observe` and those above that.
Its files are imported by name: nothing is imported here.
"""
