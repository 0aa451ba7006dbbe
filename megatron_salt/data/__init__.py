"""Text to tokens to batches: tokenizers, preprocessing, indexed datasets and tags."""
