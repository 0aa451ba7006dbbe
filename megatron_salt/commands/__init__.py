"""The commands of `megatron-salt`, a file each: its arguments, and what it runs and prints."""
