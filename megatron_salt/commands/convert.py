"""Hugging Face models to checkpoints, and checkpoints to Hugging Face models.

    megatron-salt convert --from smollm2/ --to checkpoints/smollm2
    megatron-salt convert --from runs/salt --to salt-hf/

The direction follows from what `--from` is. A checkpoint made of a Hugging Face folder can teach,
tag, be scored, and start students (train.init_from); its model.yaml has the settings for those.
Nothing but safetensors and JSON is read, and every weight keeps its bits. docs/huggingface.md says
which models can be converted.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--from", required=True, dest="source", metavar="DIR",
        help="a Hugging Face folder; or a checkpoint, or an output_dir of a run")  # fmt: skip
    add("--to", required=True, type=Path, dest="target", metavar="DIR",
        help="a new folder")  # fmt: skip
    add("--ignore-field", nargs="+", action="extend", default=[], metavar="NAME",
        help="fields of config.json that change nothing of what the model computes")  # fmt: skip
    add("--tokenizer-as-is", action="store_true",
        help="of a checkpoint: copy its tokenizer's file, where transformers has none")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    # torch takes seconds to import: `--help` does not wait for it.
    from megatron_salt.huggingface.convert import CONFIG, export_checkpoint, import_folder

    if (Path(args.source) / CONFIG).is_file() and not (Path(args.source) / "checkpoints").exists():
        made = import_folder(Path(args.source), args.target, args.ignore_field)
        model = made.config
        print(
            f"{args.target}: {model.num_layers} layers of {model.hidden_size}, {made.vocab_size} "
            f"rows of vocabulary, at most {made.seq_length} tokens at a time, {made.precision}. "
            f"Settings for a student of this shape: {args.target / 'model.yaml'}"
        )
        return 0
    if args.ignore_field:
        raise ValueError("--ignore-field is for Hugging Face folders, and --from is a checkpoint")
    kind = export_checkpoint(args.source, args.target, args.tokenizer_as_is)
    print(f"{args.target}: {kind} of {args.source}")
    return 0
