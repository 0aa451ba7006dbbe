"""The commands of `megatron-salt`: the arguments of each, and what it does with them."""
