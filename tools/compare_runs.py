"""`megatron-salt compare`, from a checkout; the code is megatron_salt/commands/compare.py."""

import sys

from megatron_salt.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
