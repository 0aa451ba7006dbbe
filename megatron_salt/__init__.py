"""megatron_salt: pre-train a large language model with help from a small one (SALT)."""

__version__ = "0.1.0"
