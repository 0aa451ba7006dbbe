"""Formats on disk: checkpoints, their weights, what they say about themselves."""
