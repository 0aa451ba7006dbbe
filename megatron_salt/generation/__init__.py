"""Text from checkpoints: prompts continued by several models, side by side."""
