"""Entry point of evaluation: held-out nats per token of checkpoints, at any layout they were saved.

    python -m megatron_salt.evaluate --checkpoint RUN_OR_CHECKPOINT [...] --data PREFIX

Runs alone or under `torchrun`/`srun`; ranks share the rows. Every model is scored with the same
frozen forward pass that a teacher uses, so student and teacher are compared on equal terms.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_salt.config import DataConfig, Word
from megatron_salt.noise import silence_known_warnings

if TYPE_CHECKING:  # torch takes seconds to import: `--help` does not wait for it
    from torch import Tensor

    from megatron_salt.data.dataset import Batch
    from megatron_salt.model.teacher import Teacher
    from megatron_salt.parallel.groups import Groups


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
    # Its threads, left to the interpreter's end, can abort a rank that is done.
    dist.destroy_process_group()


def held_out_data(own: DataConfig, arguments: argparse.Namespace) -> DataConfig:
    """What to score: the data that the arguments name, else the held-out data of the run itself."""
    data = dataclasses.replace(own, seq_length=arguments.seq_length or own.seq_length)
    if arguments.data and arguments.split:
        equal_parts = [Word(word) for prefix in arguments.data for word in ("1", prefix)]
        return dataclasses.replace(
            data, train_data_path=equal_parts, valid_data_path=[], split=arguments.split
        )
    return dataclasses.replace(data, valid_data_path=arguments.data) if arguments.data else data


def score(path: str, arguments: argparse.Namespace, groups: Groups) -> dict[str, Any]:
    """Held-out CE and accuracy of one checkpoint.

    Raises: ValueError or FileNotFoundError naming the checkpoint or dataset that is wrong.
    """
    import torch.distributed as dist

    from megatron_salt import checkpoint as ckpt
    from megatron_salt.data.dataset import DataSource, verify_all
    from megatron_salt.data.tokenizer import load_tokenizer
    from megatron_salt.kernels import VocabShard
    from megatron_salt.model.teacher import Teacher
    from megatron_salt.parallel.engine import DTYPES
    from megatron_salt.parallel.groups import from_rank_0
    from megatron_salt.resume import check_teacher_fits

    folder = ckpt.resolve(path, what="--checkpoint")
    manifest = ckpt.read_manifest(folder)
    precision = arguments.precision or manifest.precision
    tokenizer = load_tokenizer(folder / "tokenizer")
    data = held_out_data(manifest.config.data, arguments)
    verify_all(data, tokenizer)
    check_teacher_fits(folder, manifest, manifest.vocab_size, data.seq_length)
    model = Teacher(
        folder,
        manifest,
        groups,
        vocab=VocabShard(size=manifest.vocab_size, start=0, stop=manifest.vocab_size),
        head_columns=manifest.vocab_size,
        seq_length=data.seq_length,
        micro_batch_size=arguments.micro_batch_size,
        dtype=DTYPES[precision],
    )
    with tempfile.TemporaryDirectory() as scratch:
        # One name on all ranks: rank 0 writes the index files, the others map them.
        cache = Path(from_rank_0(scratch))
        source = DataSource(
            data, tokenizer, num_samples=1, seed=0, cache_path=cache, held_out_only=True
        )
        batches = source.evaluation_batches(
            arguments.samples, arguments.micro_batch_size, groups.dp_rank, groups.layout.dp_size
        )
        sums = sum_scores(model, batches)
        dist.all_reduce(sums)
    ce_nats, correct, tokens = sums.tolist()
    return {
        "checkpoint": path,
        "step": manifest.step,
        "valid_ce_nats": ce_nats / tokens,
        "valid_accuracy": correct / tokens,
        "valid_tokens": int(tokens),
        "seq_length": data.seq_length,
        "precision": precision,
    }


def sum_scores(model: Teacher, batches: Sequence[Batch]) -> Tensor:
    """Sums of CE in nats, of right guesses and of counted tokens over this rank's batches, fp64."""
    import torch

    from megatron_salt.kernels import Chunking, Heads, VocabShard, kd_loss

    size = model.manifest.vocab_size
    vocab = VocabShard(size=size, start=0, stop=size)
    device = model.groups.device
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    assert model.head_WE is not None  # one stage: every rank has the head
    for batch in batches:
        on_device = batch.to(device)
        hidden_BSE = model.hidden_states(on_device.tokens_RS)
        assert hidden_BSE is not None
        labels_T, mask_T = on_device.labels_RS.flatten(), on_device.mask_RS.flatten()
        heads = Heads.of(hidden_BSE.flatten(0, 1), model.head_WE, None, None, vocab, Chunking())
        for chunk in heads.chunks():
            labels_N, mask_N = labels_T[chunk.start : chunk.stop], mask_T[chunk.start : chunk.stop]
            logits_NW = chunk.student_logits_NW
            with torch.no_grad():
                scored = kd_loss(
                    logits_NW, None, labels_N, ce_weight_T=mask_N, kd_weight_T=0.0, vocab=vocab
                )
            correct = (logits_NW.argmax(dim=1) == labels_N) * mask_N
            values = ((scored.ce_T * mask_N).sum(), correct.sum(), mask_N.sum())
            sums += torch.stack([value.double() for value in values])
    return sums


if __name__ == "__main__":
    main()
