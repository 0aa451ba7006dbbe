"""`megatron-salt inspect-checkpoint`, from a checkout; the code is in megatron_salt/commands/."""

import sys

from megatron_salt.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["inspect-checkpoint", *sys.argv[1:]]))
