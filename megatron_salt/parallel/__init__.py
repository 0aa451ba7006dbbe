"""Where ranks, stages and rows of work lie, and the engine that drives a step over them."""
