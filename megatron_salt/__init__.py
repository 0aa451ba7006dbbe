"""Pre-training of large language models with help from a small one (SALT, arXiv 2410.18779)."""

__version__ = "0.1.0"
