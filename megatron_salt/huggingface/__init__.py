"""Models of transformers, taken as they are. transformers itself is imported when one is named."""
