"""A small model over a dataset: tags, selections, and a look at both."""
