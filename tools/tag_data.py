"""`megatron-salt tag`, from a checkout; the code is megatron_salt/commands/tag.py."""

import sys

from megatron_salt.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["tag", *sys.argv[1:]]))
