"""The method as pure functions: read this folder with the paper open."""
