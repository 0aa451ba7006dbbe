"""`python -m megatron_salt.evaluate` is `megatron-salt evaluate`; see commands/evaluate.py."""

import sys

from megatron_salt.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
