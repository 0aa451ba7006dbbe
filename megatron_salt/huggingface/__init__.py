"""Hugging Face's formats: models that come in as checkpoints or teach as they are, and go out."""
