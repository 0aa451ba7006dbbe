"""Entry point of evaluation: held-out nats per token of checkpoints, at any layout they were saved.

    python -m megatron_salt.evaluate --checkpoint RUN_OR_CHECKPOINT [...] --data PREFIX

Runs alone or under `torchrun`/`srun`; ranks share the rows. Every model is scored with the same
frozen forward pass that a teacher uses, so student and teacher are compared on equal terms.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_salt.config import Word
from megatron_salt.noise import silence_known_warnings


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m megatron_salt.evaluate", description=__doc__)
    parser.add_argument(
        "--checkpoint", nargs="+", required=True, help="Checkpoints, or output_dirs of runs."
    )
    parser.add_argument(
        "--data", nargs="+", help="Dataset prefixes; default: the held-out data of its own run."
    )
    parser.add_argument(
        "--split", help="With --data: score the second part of this split, as 95,5; default: all."
    )
    parser.add_argument("--samples", type=int, default=1024, help="Sequences to score at most.")
    parser.add_argument("--seq_length", type=int, help="Default: the checkpoint's.")
    parser.add_argument("--micro_batch_size", type=int, default=8)
    parser.add_argument(
        "--precision", choices=["fp32", "bf16", "fp16"], help="Default: the checkpoint's."
    )
    parser.add_argument("--output", type=Path, help="Also write the results as JSON.")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Score every checkpoint and print one line each; bad files end with one line and status 2."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    for name in ("samples", "micro_batch_size"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)}: must be at least 1")
    silence_known_warnings()
    import torch.distributed as dist

    from megatron_salt.parallel.groups import FailedElsewhere, initialize

    groups = initialize(1, 1, timeout_minutes=30.0)
    try:
        results = [score(path, arguments, groups) for path in arguments.checkpoint]
    except FailedElsewhere as error:
        raise SystemExit(2) from error
    except (ValueError, FileNotFoundError) as error:
        print(f"evaluate: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    if groups.rank == 0:
        for result in results:
            print(
                f"{result['checkpoint']}: {result['valid_ce_nats']:.4f} nats/token, accuracy "
                f"{result['valid_accuracy']:.4f}, {result['valid_tokens']} tokens"
            )
        if arguments.output:
            arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    dist.barrier()


def score(path: str, arguments: argparse.Namespace, groups: Any) -> dict[str, Any]:
    """Held-out CE and accuracy of one checkpoint.

    Raises: ValueError or FileNotFoundError naming the checkpoint or dataset that is wrong.
    """
    import dataclasses

    import torch
    import torch.distributed as dist

    from megatron_salt import checkpoint as ckpt
    from megatron_salt.data.dataset import DataSource, verify_all
    from megatron_salt.data.tokenizer import load_tokenizer
    from megatron_salt.kernels import VocabShard, kd_loss
    from megatron_salt.model.teacher import Teacher
    from megatron_salt.parallel.engine import DTYPES
    from megatron_salt.resume import check_teacher_fits

    folder = ckpt.resolve(path, what="--checkpoint")
    manifest = ckpt.read_manifest(folder)
    precision = arguments.precision or manifest.precision
    tokenizer = load_tokenizer(folder / "tokenizer")
    data = dataclasses.replace(
        manifest.config.data, seq_length=arguments.seq_length or manifest.config.data.seq_length
    )
    if arguments.data and arguments.split:
        equal_parts = [Word(word) for prefix in arguments.data for word in ("1", prefix)]
        data = dataclasses.replace(
            data, train_data_path=equal_parts, valid_data_path=[], split=arguments.split
        )
    elif arguments.data:
        data = dataclasses.replace(data, valid_data_path=arguments.data)
    verify_all(data, tokenizer)
    vocab = VocabShard(size=manifest.vocab_size, start=0, stop=manifest.vocab_size)
    check_teacher_fits(folder, manifest, manifest.vocab_size, data.seq_length)
    model = Teacher(
        folder,
        manifest,
        groups,
        vocab=vocab,
        head_columns=manifest.vocab_size,
        seq_length=data.seq_length,
        micro_batch_size=arguments.micro_batch_size,
        dtype=DTYPES[precision],
    )
    assert model.head_WE is not None  # one stage: every rank has the head
    with tempfile.TemporaryDirectory() as scratch:
        # One name on all ranks: rank 0 writes the index files, the others map them.
        shared = [scratch]
        dist.broadcast_object_list(shared, src=0)
        source = DataSource(
            data, tokenizer, num_samples=1, seed=0, cache_path=Path(shared[0]), held_out_only=True
        )
        sums = torch.zeros(3, dtype=torch.float64, device=groups.device)
        batches = source.evaluation_batches(
            arguments.samples, arguments.micro_batch_size, groups.dp_rank, groups.layout.dp_size
        )
        for batch in batches:
            on_device = batch.to(groups.device)
            hidden_BSE = model.hidden_states(on_device.tokens_RS)
            assert hidden_BSE is not None
            logits_TW = hidden_BSE.flatten(0, 1) @ model.head_WE.t()
            labels_T, mask_T = on_device.labels_RS.flatten(), on_device.mask_RS.flatten()
            with torch.no_grad():
                scored = kd_loss(
                    logits_TW, None, labels_T, ce_weight_T=mask_T, kd_weight_T=0.0, vocab=vocab
                )
            hits = (logits_TW.argmax(dim=1) == labels_T) * mask_T
            sums += torch.stack(
                [(scored.ce_T * mask_T).sum().double(), hits.sum().double(), mask_T.sum().double()]
            )
        dist.all_reduce(sums)
    ce, hits, tokens = sums.tolist()
    return {
        "checkpoint": path,
        "step": manifest.step,
        "valid_ce_nats": ce / tokens,
        "valid_accuracy": hits / tokens,
        "valid_tokens": int(tokens),
        "seq_length": data.seq_length,
        "precision": precision,
    }


if __name__ == "__main__":
    main()
