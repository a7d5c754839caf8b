"""Turn a Hugging Face checkpoint into one that shares attention across layers."""

__version__ = "0.1.0"
