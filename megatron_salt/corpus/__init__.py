"""From text to a tokenizer and an indexed dataset."""
