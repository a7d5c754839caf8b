"""How do model families of transformers differ? Data files, and the classes that hold what stands in them.

Everything from `read` upwards may import it. It is never carried into a converted model.
It imports `sa_convert.errors` and nothing else of ours; neither torch nor transformers.
"""
