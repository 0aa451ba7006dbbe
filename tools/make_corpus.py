"""Makes a small real JSONL corpus out of the source files of the running Python.

python tools/make_corpus.py --output corpus.jsonl --max-bytes 20000000
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_salt.corpus.python_sources import make_corpus


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, help="the JSONL file to write")
    parser.add_argument("--max-bytes", type=int, help="largest size of the output (default: all)")
    parser.add_argument(
        "--source",
        nargs="+",
        default=[],
        metavar="DIR",
        help="directories of .py, .rst and .txt files (default: Python's standard library)",
    )
    parser.add_argument("--seed", type=int, default=1234, help="of the shuffle (default: 1234)")
    args = parser.parse_args(argv)
    try:
        report = make_corpus(
            args.output, sources=args.source, max_bytes=args.max_bytes, seed=args.seed
        )
    except (ValueError, OSError) as error:
        print(f"make_corpus: error: {error}", file=sys.stderr)
        return 1
    print(f"{args.output}: {report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
