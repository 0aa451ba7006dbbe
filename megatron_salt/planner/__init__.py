"""What a run will need and how long it will take, before any data or teacher exists.

`inputs` reads, `hardware` and `times` turn sizes into seconds, `estimate` simulates one layout,
`ranking` compares all that the GPUs allow, `output` writes. Memory is `megatron_salt.memory`'s.
"""
