"""`megatron-salt plan`, from a checkout; the code is megatron_salt/commands/plan.py."""

import sys

from megatron_salt.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
