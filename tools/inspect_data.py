"""`megatron-salt inspect`, from a checkout; the code is megatron_salt/commands/inspect.py."""

import sys

from megatron_salt.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["inspect", *sys.argv[1:]]))
