"""`megatron-salt tokenizer`, from a checkout; the code is megatron_salt/commands/tokenizer.py."""

import sys

from megatron_salt.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["tokenizer", *sys.argv[1:]]))
