"""Code for tokenizers, carried only by converted models whose tokenizer_config.json names it."""
