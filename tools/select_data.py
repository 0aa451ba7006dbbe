"""`megatron-salt select`, from a checkout; the code is megatron_salt/commands/select.py."""

import sys

from megatron_salt.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["select", *sys.argv[1:]]))
