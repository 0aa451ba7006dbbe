"""`megatron-salt corpus`, from a checkout; the code is megatron_salt/commands/corpus.py."""

import sys

from megatron_salt.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["corpus", *sys.argv[1:]]))
