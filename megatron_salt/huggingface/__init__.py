"""Hugging Face's formats: what is written for its libraries, and read from its folders."""
