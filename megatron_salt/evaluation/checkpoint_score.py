"""Held-out nats per token of a checkpoint, by the frozen forward pass that teachers use."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_salt.checkpoint.folder import resolve
from megatron_salt.checkpoint.manifest import read_checkpoint_manifest, tokenizer_folder
from megatron_salt.checkpoint.weights import load_frozen
from megatron_salt.config.fields import DataConfig, TextOrNumber
from megatron_salt.config.values import parse_blend
from megatron_salt.data.dataset import Batch, DataSource, verify_datasets
from megatron_salt.data.manifest import data_tokenizer, idx_path
from megatron_salt.data.order import evaluation_rows
from megatron_salt.data.tokenizer import load_tokenizer
from megatron_salt.evaluation.score_sums import ScoreSums, part_sums
from megatron_salt.files.progress import Progress
from megatron_salt.kernels import VocabShard, token_scores
from megatron_salt.model.frozen import FrozenModel
from megatron_salt.model.loss import HELD_OUT_SCORES
from megatron_salt.model.weights import DTYPES
from megatron_salt.parallel.groups import Groups, from_rank_0
from megatron_salt.teacher.find import check_teacher_fits

DATA_FOLDERS = "MEGATRON_SALT_DATA"
"""Environment: folders, between colons, in which datasets are looked for that have moved."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """What `megatron-salt evaluate` was asked for; None: as the checkpoint has it."""

    data: Sequence[str] | None
    """Dataset prefixes, whole or the second part of `split`; None: its run's held-out data."""
    split: str | None
    samples: int
    seq_length: int | None
    micro_batch_size: int
    precision: str | None


def held_out_data(own: DataConfig, request: ScoreRequest) -> DataConfig:
    """What to score: the data that the request names, else the held-out data of the run itself."""
    data = dataclasses.replace(own, seq_length=request.seq_length or own.seq_length)
    if request.data and request.split:
        equal_parts = [TextOrNumber(word) for prefix in request.data for word in ("1", prefix)]
        return dataclasses.replace(
            data, train_data_path=equal_parts, valid_data_path=[], split=request.split
        )
    if not request.data:
        prefixes = [find_moved(path) for path in data.valid_data_path]
        blend, weights = parse_blend(data.train_data_path, "data.train_data_path")
        if not prefixes:
            blend = [find_moved(path) for path in blend]
        pairs = zip(weights, blend, strict=True)
        train = [TextOrNumber(word) for weight, path in pairs for word in (weight, path)]
        return dataclasses.replace(
            data, valid_data_path=[TextOrNumber(path) for path in prefixes], train_data_path=train
        )
    return dataclasses.replace(data, valid_data_path=[TextOrNumber(path) for path in request.data])


def find_moved(prefix: str) -> str:
    """Where a run's dataset lies now: at its path, or under a folder of MEGATRON_SALT_DATA.

    Raises: FileNotFoundError saying what the path is relative to, and what to do.
    """
    folders = filter(None, os.environ.get(DATA_FOLDERS, "").split(os.pathsep))
    places = [Path(prefix), *(Path(each) / Path(prefix).name for each in folders)]
    for place in places:
        if idx_path(place).is_file():
            return str(place)
    raise FileNotFoundError(
        f"the run's held-out data {prefix} is not there, seen from {Path.cwd()} (the path is as "
        f"the run was given it): give --data PREFIX, or set {DATA_FOLDERS} to the folder that "
        f"holds {Path(prefix).name}"
    )


def score_checkpoint(path: str, request: ScoreRequest, groups: Groups) -> dict[str, Any]:
    """Held-out CE and accuracy of one checkpoint; ranks share the rows.

    Raises: ValueError or FileNotFoundError naming the checkpoint or dataset that is wrong.
    """
    folder = resolve(path, what="--checkpoint")
    manifest = read_checkpoint_manifest(folder)
    precision = request.precision or manifest.model.precision
    own = DataConfig(seq_length=manifest.model.seq_length)
    if manifest.training or not request.data:
        own = manifest.run.config.data
    data = held_out_data(own, request)
    first = [*data.valid_data_path, *parse_blend(data.train_data_path, "data.train_data_path")[0]]
    tokenizer = data_tokenizer(first[0], load_tokenizer(tokenizer_folder(folder, manifest)))
    verify_datasets(data, tokenizer)
    vocab_size = tokenizer.vocab_size
    check_teacher_fits(folder, manifest, vocab_size, data.seq_length)
    vocab = VocabShard(size=vocab_size, start=0, stop=vocab_size)
    model = load_frozen(
        folder, manifest, groups, seq_length=data.seq_length, dtype=DTYPES[precision], head=vocab,
        head_columns=vocab_size,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        # One name on all ranks: rank 0 writes the index files, the others map them.
        cache = Path(from_rank_0(scratch))
        source = DataSource(
            data, tokenizer, num_samples=1, seed=0, cache_path=cache, held_out_only=True
        )
        rounds = evaluation_rows(
            min(request.samples, source.num_held_out()), request.micro_batch_size, groups.dp_rank,
            groups.layout.dp_size,
        )  # fmt: skip
        batches = Progress(len(rounds), "batch", path, visible=groups.rank == 0).over(
            source.read_held_out(rows) for rows in rounds
        )
        names = source.valid_parts.names
        packed, parts = packed_scores(model, vocab, batches, groups.device, len(names))
        dist.all_reduce(packed)
        dist.all_reduce(parts)
        stored = manifest.model.evaluation
        same = stored is not None and stored.data == source.evaluation_fingerprint(request.samples)
        # Where the run's own number of samples makes the text the same, it is the whole difference.
        run = manifest.training
        own_samples = run.config.train.eval_samples if run and stored else request.samples
        if stored and stored.data != source.evaluation_fingerprint(own_samples):
            own_samples = request.samples
    sums = ScoreSums.unpack(packed)
    by_part = {
        f"valid_ce_nats/{name}": ce_nats / tokens
        for name, (tokens, ce_nats) in zip(names, parts.T.tolist(), strict=True)
        if tokens
    }
    return by_part | {
        "checkpoint": path,
        "step": manifest.model.step,
        "valid_ce_nats": sums.ce_nats / sums.tokens,
        "valid_accuracy": sums.correct / sums.tokens,
        "valid_tokens": int(sums.tokens),
        "seq_length": data.seq_length,
        "precision": precision,
        "text_of_its_run": same,
        "samples_of_its_run": own_samples,
    }


def packed_scores(
    model: FrozenModel, vocab: VocabShard, batches: Iterable[Batch], device: torch.device,
    num_parts: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`ScoreSums` of this rank's batches, packed, as a run's own evaluations add them up; and
    [2, P] of the parts: tokens and CE."""
    packed = ScoreSums.zeros(device)
    parts = torch.zeros((2, num_parts), dtype=torch.float64, device=device)
    assert model.head_WE is not None
    for batch in batches:
        on_device = batch.to(device)
        hidden_TE = model.forward(on_device.tokens_RS).flatten(0, 1)
        scores = token_scores(
            hidden_TE, model.head_WE, on_device.labels_RS.flatten(), vocab=vocab,
            want=HELD_OUT_SCORES,
        )  # fmt: skip
        mask_T = on_device.mask_RS.flatten()
        packed += ScoreSums.pack(scores, mask_T)
        if on_device.part_RS is not None:
            assert scores.ce_T is not None
            parts += part_sums([scores.ce_T], mask_T, on_device.part_RS.flatten(), num_parts)
    return packed, parts
