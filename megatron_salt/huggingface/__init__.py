"""Models of Hugging Face: folders that come in as checkpoints, and checkpoints that go out."""
