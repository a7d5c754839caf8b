"""How good a model is: perplexity, divergence, copying, decoding with a cache, the gate.
Rooms above `measure` may import it: `observe` and those above that.
Its files are imported by name: nothing is imported here.
"""
