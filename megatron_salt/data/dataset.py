"""Token datasets of a run: megatron-core's `GPTDataset`, one per epoch, and its blending.

Why one dataset per epoch: `GPTDataset` built for N samples shuffles all epochs together, so its
order depends on N and a run that is extended would see other data. Here epoch e of a prefix is a
`GPTDataset` of exactly one epoch with a seed of its own, so the order is a function of (seed, row).
Each epoch leaves out its last tokens that do not fill a sequence.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from torch import Tensor

from megatron_salt.config import DataConfig, parse_blend
from megatron_salt.data.manifest import read_manifest, verify_dataset
from megatron_salt.data.objective import Mixture, make_mixture
from megatron_salt.data.order import epoch_and_offset, epoch_seed, evaluation_rows
from megatron_salt.data.tokenizer import Tokenizer, load_tokenizer

# Held-out samples are drawn with this seed whatever train.seed is, so runs score the same text.
EVALUATION_SEED = 1234


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of one data-parallel rank. R rows, S tokens each."""

    tokens_RS: Tensor
    """Inputs, int64."""
    labels_RS: Tensor
    """The token after each input, int64."""
    mask_RS: Tensor
    """1 where the position counts, fp32."""
    prefix_R: Tensor | None = None
    """How many of a row's first tokens see each other in both directions, int64, always on the CPU:
    it decides which attention runs. None where every row is causal."""

    def to(self, device: torch.device) -> Batch:
        moved: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            stays = value is None or field.name == "prefix_R"
            moved[field.name] = value if stays else value.to(device, non_blocking=True)
        return Batch(**moved)


def find_tokenizer(data: DataConfig) -> Tokenizer:
    """The tokenizer of the run: data.tokenizer, or the copy beside the first training dataset.

    Raises: ValueError saying what to set if there is neither.
    """
    if data.tokenizer is not None:
        return load_tokenizer(data.tokenizer)
    prefix = parse_blend(data.train_data_path, "data.train_data_path")[0][0]
    beside = Path(prefix + ".tokenizer")
    if not beside.exists():
        raise ValueError(
            f"data.tokenizer is not set and {beside} does not exist: name the tokenizer that "
            f"{prefix} was made with"
        )
    return load_tokenizer(beside)


def verify_all(data: DataConfig, tokenizer: Tokenizer) -> None:
    """Check every dataset's files and tokenizer.

    Raises: ValueError/FileNotFoundError naming the file and the remedy (see `verify_dataset`).
    """
    train_prefixes = parse_blend(data.train_data_path, "data.train_data_path")[0]
    for prefix in [*train_prefixes, *data.valid_data_path]:
        verify_dataset(prefix, tokenizer)


class EpochedDataset(torch.utils.data.Dataset):
    """An endless order over one prefix: epoch after epoch of `GPTDataset`, each shuffled anew."""

    def __init__(self, epochs: Sequence[GPTDataset]) -> None:
        self.epochs = list(epochs)
        self.samples_per_epoch = len(self.epochs[0])
        # What `BlendedDataset` asks of its parts.
        self.index_split = self.epochs[0].index_split
        self.unique_identifiers = {
            "class": type(self).__name__,
            "epochs": [epoch.unique_identifiers for epoch in self.epochs],
        }

    def __len__(self) -> int:
        return self.samples_per_epoch * len(self.epochs)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        epoch, offset = epoch_and_offset(int(row), self.samples_per_epoch)
        return self.epochs[epoch][offset]


class DataSource:
    """Reads the rows of a step or of an evaluation. Every rank can read any row.

    Args:
        num_samples: rows the run needs in all; decides how many epochs are indexed, not the order.
        cache_path: folder for index files, shared by all ranks; rank 0 writes, the others map.
        held_out_only: index no training data.
    """

    def __init__(
        self,
        data: DataConfig,
        tokenizer: Tokenizer,
        *,
        num_samples: int,
        seed: int,
        cache_path: Path,
        held_out_only: bool = False,
    ) -> None:
        self.data, self.tokenizer, self.seed = data, tokenizer, seed
        self.cache_path = cache_path
        prefixes, weights = parse_blend(data.train_data_path, "data.train_data_path")
        shares = np.asarray(weights) / sum(weights)
        self.prefixes, self.shares = prefixes, shares.tolist()
        self.valid = self._held_out(prefixes)
        self.parts: list[EpochedDataset] = []
        self.train: Any = None
        self.mixture: Mixture | None = None
        if held_out_only:
            return
        self.mixture = make_mixture(data, tokenizer, seed)
        # Greedy blending never strays from the share by more than one sample per dataset.
        needed = [int(np.ceil(share * num_samples)) + len(prefixes) for share in shares]
        if len(prefixes) == 1:
            needed = [num_samples]
        self.parts = [
            self._epochs(prefix, count) for prefix, count in zip(prefixes, needed, strict=True)
        ]
        self.train = self.parts[0]
        if len(prefixes) > 1:
            config = self._config(prefixes[0], seed, held_out=False)
            config.path_to_cache = str(self.cache_path / "blend")
            self.train = self._blend(num_samples, config)

    def _blend(self, num_samples: int, config: GPTDatasetConfig) -> BlendedDataset:
        """The blend's index; rank 0 writes it before the others map it."""
        first = not dist.is_initialized() or dist.get_rank() == 0
        if not first:
            dist.barrier()
        blended = BlendedDataset(self.parts, list(self.shares), num_samples, config)
        if first and dist.is_initialized():
            dist.barrier()
        return blended

    def _config(self, prefix: str, seed: int, *, held_out: bool) -> GPTDatasetConfig:
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=self.data.seq_length,
            blend=([prefix], None),
            split=self._split(held_out),
            # megatron-core's cache key holds the path but not the content: new data under an old
            # name must not meet the old index.
            path_to_cache=str(self.cache_path / dataset_fingerprint(prefix)),
            tokenizer=self.tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=self.data.eod_mask_loss,
            create_attention_mask=False,
        )
        wanted = 1 if held_out else 0
        # The builder would index every part of the split; one is asked for.
        config.split_matrix = [
            bounds if part == wanted else None for part, bounds in enumerate(config.split_matrix)
        ]
        return config

    def _split(self, held_out: bool) -> str:
        if self.data.valid_data_path:
            return "0,1,0" if held_out else "1,0,0"
        return f"{self.data.split},0"

    def _build(self, config: GPTDatasetConfig) -> list[GPTDataset | None]:
        """One epoch of the part asked for; collective (rank 0 writes the index files first)."""
        sizes = [None, None, None]
        builder = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config)
        try:
            return builder.build()
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(
                f"data.cache_path {self.cache_path}: an index file cannot be built or read "
                f"({error}); if an earlier start was killed while writing it, delete the folder"
            ) from error

    def _epochs(self, prefix: str, num_samples: int) -> EpochedDataset:
        epochs: list[GPTDataset] = []
        while not epochs or len(epochs) * len(epochs[0]) < num_samples:
            config = self._config(prefix, epoch_seed(self.seed, len(epochs)), held_out=False)
            train = self._build(config)[0]
            if train is None or len(train) == 0:
                raise ValueError(
                    f"{prefix}: the training part holds no sequence of data.seq_length = "
                    f"{self.data.seq_length} tokens; use more text or shorter sequences"
                )
            epochs.append(train)
        return EpochedDataset(epochs)

    def _held_out(self, train_prefixes: Sequence[str]) -> list[GPTDataset]:
        found = []
        for prefix in self.data.valid_data_path or train_prefixes:
            valid = self._build(self._config(prefix, EVALUATION_SEED, held_out=True))[1]
            if valid is None or len(valid) == 0:
                raise ValueError(
                    f"{prefix}: the held-out part holds no sequence of data.seq_length = "
                    f"{self.data.seq_length} tokens; give data.valid_data_path or a larger second "
                    f"share in data.split = {self.data.split!r}"
                )
            found.append(valid)
        return found

    def read(self, rows: Sequence[int]) -> Batch:
        """Training rows of the endless order, each with its objective."""
        batch = _stack([self.train[row] for row in rows])
        return batch if self.mixture is None else _apply(self.mixture, batch, rows)

    def num_held_out(self) -> int:
        return min(len(valid) for valid in self.valid) * len(self.valid)

    def read_held_out(self, rows: Sequence[int]) -> Batch:
        """Held-out rows, taken in turn from each held-out dataset; row -1 counts for nothing."""
        samples = []
        for row in rows:
            index, which = divmod(max(row, 0), len(self.valid))
            sample = dict(self.valid[which][index])
            if row < 0:
                sample["loss_mask"] = torch.zeros_like(sample["loss_mask"])
            samples.append(sample)
        return _stack(samples)

    def evaluation_batches(
        self, num_samples: int, micro_batch_size: int, dp_rank: int, dp_size: int
    ) -> list[Batch]:
        """This data-parallel rank's micro-batches of one evaluation."""
        total = min(num_samples, self.num_held_out())
        rounds = evaluation_rows(total, micro_batch_size, dp_rank, dp_size)
        return [self.read_held_out(rows) for rows in rounds]

    def fingerprints(self) -> list[str]:
        """Identity of each training dataset, to notice at a resume that the data changed."""
        return [dataset_fingerprint(prefix) for prefix in self.prefixes]

    def evaluation_fingerprint(self, num_samples: int) -> str:
        """Identity of the held-out samples that an evaluation scores."""
        prefixes = self.data.valid_data_path or self.prefixes
        parts = [dataset_fingerprint(prefix) for prefix in prefixes]
        total = min(num_samples, self.num_held_out())
        held_out = [bool(self.data.valid_data_path), self._split(True), EVALUATION_SEED]
        text = repr((parts, held_out, self.data.seq_length, self.data.eod_mask_loss, total))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def epochs_needed(self, num_samples: int) -> dict[str, float]:
        """How often each prefix is read over `num_samples` rows."""
        return {
            prefix: share * num_samples / part.samples_per_epoch
            for prefix, share, part in zip(self.prefixes, self.shares, self.parts, strict=True)
        }


def dataset_fingerprint(prefix: str) -> str:
    """Short hash of a dataset: the token file's hash from its manifest, else its size and times."""
    manifest = read_manifest(prefix)
    if manifest is not None:
        text = manifest.bin_sha256 + manifest.idx_sha256
    else:
        stats = [Path(f"{prefix}{suffix}").stat() for suffix in (".bin", ".idx")]
        text = repr([(stat.st_size, stat.st_mtime_ns) for stat in stats])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _stack(samples: Sequence[dict[str, Tensor]]) -> Batch:
    """torch.stack copies, so nobody can write into the dataset's cached masks."""
    return Batch(
        tokens_RS=torch.stack([sample["tokens"] for sample in samples]),
        labels_RS=torch.stack([sample["labels"] for sample in samples]),
        mask_RS=torch.stack([sample["loss_mask"] for sample in samples]).float(),
    )


def _apply(mixture: Mixture, batch: Batch, rows: Sequence[int]) -> Batch:
    """Give every row of a causal batch the objective that the mixture draws for it."""
    text_RS = torch.cat([batch.tokens_RS, batch.labels_RS[:, -1:]], dim=1).numpy()
    samples = [mixture.sample(text_S, row) for text_S, row in zip(text_RS, rows, strict=True)]
    return dataclasses.replace(
        batch,
        tokens_RS=torch.from_numpy(np.stack([sample.tokens_S for sample in samples])),
        labels_RS=torch.from_numpy(np.stack([sample.labels_S for sample in samples])),
        mask_RS=torch.from_numpy(np.stack([sample.mask_S for sample in samples])),
        prefix_R=torch.tensor([sample.prefix for sample in samples]),
    )


logging.getLogger("megatron.core").setLevel(logging.WARNING)
