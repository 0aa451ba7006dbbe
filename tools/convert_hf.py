"""`megatron-salt convert`, from a checkout; the code is megatron_salt/commands/convert.py."""

import sys

from megatron_salt.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
