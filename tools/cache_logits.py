"""`megatron-salt cache-logits`, from a checkout; see megatron_salt/commands/cache_logits.py."""

import sys

from megatron_salt.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["cache-logits", *sys.argv[1:]]))
