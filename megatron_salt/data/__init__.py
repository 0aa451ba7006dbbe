"""Rows of a step: tokenizers, datasets, tags and selections as they are read."""
