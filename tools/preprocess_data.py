"""`megatron-salt preprocess`, from a checkout; the code is megatron_salt/commands/preprocess.py."""

import sys

from megatron_salt.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["preprocess", *sys.argv[1:]]))
