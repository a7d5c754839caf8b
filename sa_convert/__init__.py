"""Turn a Hugging Face checkpoint into one that shares attention across layers.

Importing this package lets transformers load converted checkpoints without remote code.
"""

from sa_convert.registration import register_when_loaded

__version__ = "0.1.0"

register_when_loaded()
