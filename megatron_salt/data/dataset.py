"""Token datasets of a run: megatron-core's `GPTDataset`, one per epoch, and its blending.

Why one dataset per epoch: `GPTDataset` built for N samples shuffles all epochs together, so its
order depends on N and a run that is extended would see other data. Here epoch e of a prefix is a
`GPTDataset` of exactly one epoch with a seed of its own, so the order is a function of (seed, row).
Each epoch leaves out its last tokens that do not fill a sequence.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.utils import Split
from numpy.typing import NDArray
from torch import Tensor

from megatron_salt.config.fields import DataConfig
from megatron_salt.config.values import check_split, parse_blend
from megatron_salt.data.epochs import (
    Epoch,
    EpochedDataset,
    PlacedDataset,
    SampleFields,
    TaggedDataset,
    Tags,
    WindowDataset,
)
from megatron_salt.data.index_cache import CheckedBlend, CheckedDataset
from megatron_salt.data.logits import StoredLogits
from megatron_salt.data.manifest import (
    check_exists,
    read_dataset_manifest,
    tokenizer_directory,
    verify_dataset,
)
from megatron_salt.data.objective import Mixture, make_mixture
from megatron_salt.data.order import epoch_seed
from megatron_salt.data.parts import HeldOutParts
from megatron_salt.data.sources import load_sources
from megatron_salt.data.tag_inputs import TagInputs
from megatron_salt.data.tokenizer import Tokenizer, load_tokenizer
from megatron_salt.method.salt import Phase

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
    tag_RS: Tensor | None = None
    """With data.tags: 1 where the label is among the tagging model's most likely tokens, fp32."""
    reference_loss_RS: Tensor | None = None
    """Loss on the label of the model that tagged the data, or whose logits are stored, nats, fp32;
    where a run reads it."""
    logits_ids_RSK: Tensor | None = None
    """Stored logits, in the KD phase: see `StoredLogits.of_places`; so are the next three."""
    logits_logp_RSK: Tensor | None = None
    logits_rest_RS: Tensor | None = None
    logits_entropy_RS: Tensor | None = None
    window_R: Tensor | None = None
    """Rows that are windows: the number of each in its dataset, and of its dataset, int64."""
    source_R: Tensor | None = None
    prefix_R: Tensor | None = None
    """How many of a row's first tokens see each other in both directions, int64, always on the CPU:
    it decides which attention runs. None where every row is causal."""
    part_RS: Tensor | None = None
    """Held-out rows of several parts: which part each label is of, int64, see `HeldOutParts`."""

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Batch:
        moving = {k: v for k, v in vars(self).items() if v is not None and k != "prefix_R"}
        return dataclasses.replace(self, **{name: change(v) for name, v in moving.items()})

    def pinned(self) -> Batch:
        """In page-locked memory, from which `to` copies beside the computation."""
        return self._changed(Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        return self._changed(lambda value: value.to(device, non_blocking=True))


def find_tokenizer(data: DataConfig) -> Tokenizer:
    """The tokenizer of the run: data.tokenizer, or the copy beside the first training dataset.

    Raises: ValueError saying what to set if there is neither.
    """
    if data.tokenizer is not None:
        return load_tokenizer(data.tokenizer)
    prefix = parse_blend(data.train_data_path, "data.train_data_path")[0][0]
    check_exists(prefix)
    beside = tokenizer_directory(prefix)
    if not beside.exists():
        raise ValueError(
            f"data.tokenizer is not set and {beside} does not exist: name the tokenizer that "
            f"{prefix} was made with"
        )
    return load_tokenizer(beside)


def verify_datasets(data: DataConfig, tokenizer: Tokenizer) -> None:
    """Check every dataset's files and tokenizer.

    Raises: ValueError/FileNotFoundError naming the file and the remedy (see `verify_dataset`).
    """
    train_prefixes = parse_blend(data.train_data_path, "data.train_data_path")[0]
    for prefix in [*train_prefixes, *data.valid_data_path]:
        verify_dataset(prefix, tokenizer)


class DataSource:
    """Reads the rows of a step or of an evaluation. Every rank can read any row.

    There are two endless orders: of all training data, and, with a selection, of the selected
    sequences, which the KD phase reads. A row means the same in both: step times global batch size.

    Args:
        num_samples: rows the run needs in all; decides how many epochs are indexed, not the order.
        num_selected: rows of the KD phase, the first ones.
        cache_path: folder for index files, shared by all ranks; rank 0 writes, the others map.
        tag_inputs: tags, selections and stored logits, if the run has any.
        with_reference_loss: read the losses of the tags; stored logits bring theirs.
        logits: those of tag_inputs, opened, on ranks that need them.
        held_out_only: index no training data.
    """

    def __init__(
        self, data: DataConfig, tokenizer: Tokenizer, *, num_samples: int, seed: int,
        cache_path: Path, num_selected: int = 0, tag_inputs: TagInputs | None = None,
        with_reference_loss: bool = False, logits: Sequence[StoredLogits] = (),
        held_out_only: bool = False,
    ) -> None:  # fmt: skip
        self.data, self.tokenizer, self.seed = data, tokenizer, seed
        self.cache_path = cache_path
        prefixes, weights = parse_blend(data.train_data_path, "data.train_data_path")
        shares = np.asarray(weights) / sum(weights)
        self.prefixes, self.shares = prefixes, shares.tolist()
        self.valid = self._held_out(prefixes)
        self.valid_prefixes = [str(prefix) for prefix in data.valid_data_path or prefixes]
        sources = [load_sources(prefix) for prefix in self.valid_prefixes]
        self.valid_parts = HeldOutParts(self.valid, self.valid_prefixes, sources)
        self.num_samples, self.num_selected = num_samples, num_selected
        self.tag_inputs = tag_inputs or TagInputs()
        self.selections = self.tag_inputs.selections
        self.logits = list(logits)
        self._documents_of: dict[int, CheckedDataset] = {}
        self.tags: list[Tags | None] = [None] * len(prefixes)
        self.parts: list[EpochedDataset] = []
        self.selected_parts: list[EpochedDataset] = []
        self.train: Any = None
        self.selected: Any = None
        self.mixture: Mixture | None = None
        if held_out_only:
            return
        self.mixture = make_mixture(data, tokenizer, seed)
        if self.tag_inputs.tags:
            self.tags = [Tags(path, with_loss=with_reference_loss) for path in data.tags]
        self.train = self._order(num_samples, self.parts, self._all_epoch)
        if self.selections or self.tag_inputs.of_windows:
            self.selected = self._order(num_selected, self.selected_parts, self._selected_epoch)

    def _order(
        self, num_samples: int, parts: list[EpochedDataset],
        build_epoch: Callable[[int, int], Epoch],
    ) -> EpochedDataset | CheckedBlend:  # fmt: skip
        """An endless order long enough for so many rows. Mutates: parts, its datasets."""
        # Greedy blending never strays from the share by more than one sample per dataset.
        needed = [int(np.ceil(share * num_samples)) + len(self.prefixes) for share in self.shares]
        if len(self.prefixes) == 1:
            needed = [num_samples]
        for which, count in enumerate(needed):
            epochs: list[Epoch] = []
            while not epochs or len(epochs) * len(epochs[0]) < count:
                epochs.append(build_epoch(which, epoch_seed(self.seed, len(epochs))))
            parts.append(EpochedDataset(epochs))
        if len(parts) == 1:
            return parts[0]
        config = self._config(self.prefixes[0], self.seed, held_out=False)
        config.path_to_cache = str(self.cache_path / "blend")
        # Rank 0 writes the blend's index before the others map it.
        first = not dist.is_initialized() or dist.get_rank() == 0
        if not first:
            dist.barrier()
        with self._naming_the_cache():
            blended = CheckedBlend(parts, self.shares, num_samples, config)
        if first and dist.is_initialized():
            dist.barrier()
        return blended

    def _config(self, prefix: str, seed: int, *, held_out: bool) -> GPTDatasetConfig:
        config = GPTDatasetConfig(
            random_seed=seed, sequence_length=self.data.seq_length,
            blend=([prefix], None), split=self._split(held_out),
            # megatron-core's cache key holds the path but not the content: new data under an old
            # name must not meet the old index.
            path_to_cache=str(self.cache_path / dataset_fingerprint(prefix)),
            tokenizer=self.tokenizer, eod_mask_loss=self.data.eod_mask_loss,
            reset_position_ids=False, reset_attention_mask=False, create_attention_mask=False,
        )  # fmt: skip
        wanted = 1 if held_out else 0
        # The builder would index every part of the split; one is asked for.
        config.split_matrix = [
            bounds if part == wanted else None for part, bounds in enumerate(config.split_matrix)
        ]
        return config

    def _split(self, held_out: bool) -> str:
        if self.data.valid_data_path:
            return "0,1,0" if held_out else "1,0,0"
        check_split(self.data.split)
        return f"{self.data.split},0"

    def _build(self, config: GPTDatasetConfig) -> list[CheckedDataset | None]:
        """One epoch of the part asked for; collective (rank 0 writes the index files first)."""
        builder = BlendedMegatronDatasetBuilder(CheckedDataset, [None] * 3, lambda: True, config)
        with self._naming_the_cache():
            return builder.build()

    @contextlib.contextmanager
    def _naming_the_cache(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(
                f"data.cache_path {self.cache_path}: an index file cannot be built or read "
                f"({error}); delete the folder: nothing is in it that is not made again"
            ) from error

    def _gpt_epoch(self, which: int, seed: int) -> CheckedDataset:
        """All training documents of a dataset, once."""
        prefix = self.prefixes[which]
        train = self._build(self._config(prefix, seed, held_out=False))[0]
        if train is None or len(train) == 0:
            raise ValueError(
                f"{prefix}: the training part holds no sequence of data.seq_length = "
                f"{self.data.seq_length} tokens; use more text or shorter sequences"
            )
        return train

    def _all_epoch(self, which: int, seed: int) -> Epoch:
        if self.data.windows:
            return self._window_epoch(which, seed, None, kd_phase=False)
        epoch, tags = self._gpt_epoch(which, seed), self.tags[which]
        self._documents_of.setdefault(which, epoch)
        return self._with_places(epoch if tags is None else TaggedDataset(epoch, tags), epoch)

    def _with_places(self, epoch: Epoch, gpt: CheckedDataset) -> Epoch:
        """Samples that say where their labels lie, if stored logits are looked up by that."""
        return PlacedDataset(epoch, gpt) if self.logits else epoch

    def _documents(self, which: int) -> CheckedDataset:
        """The training documents of a dataset; their order does not matter here."""
        found = self._documents_of.get(which) or self._gpt_epoch(which, epoch_seed(self.seed, 0))
        return self._documents_of.setdefault(which, found)

    def _window_epoch(
        self, which: int, seed: int, chosen: NDArray[np.int64] | None, *, kd_phase: bool
    ) -> Epoch:
        """Whole windows in a dataset's training part, of those chosen (None: of all), once; in the
        KD phase those of which logits are stored."""
        gpt, window = self._documents(which), self.data.seq_length
        # The training part is the first documents of the file, so the first tokens.
        num_tokens = int(gpt.dataset.sequence_lengths[: len(gpt.indices)].sum(dtype=np.int64))
        whole = np.arange(num_tokens // window)
        stored = self.tag_inputs.windows[which] if kd_phase and self.tag_inputs.windows else None
        if stored is not None:
            whole = np.intersect1d(whole, stored)
        identity = f"windows of {window}"
        if chosen is not None:
            whole, identity = np.intersect1d(whole, chosen), self.selections[which].fingerprint
            self._check_some(len(whole), self.selections[which].path)
        self._check_some(len(whole), self.prefixes[which])
        return WindowDataset(
            gpt.dataset, whole, window=window, seed=seed, eod=self.tokenizer.eod,
            eod_mask_loss=self.data.eod_mask_loss, tags=self.tags[which], identity=identity,
        )  # fmt: skip

    def _selected_epoch(self, which: int, seed: int) -> Epoch:
        """What the KD phase reads of a dataset's training part, once: the selected sequences, or
        the windows of which logits are stored."""
        selection = self.selections[which] if self.selections else None
        if selection is None or selection.window is not None:
            chosen = None if selection is None else selection.sequences
            return self._window_epoch(which, seed, chosen, kd_phase=True)
        gpt = self._documents(which)
        documents = np.intersect1d(gpt.indices, selection.sequences).astype(gpt.indices.dtype)
        tokens = int(gpt.dataset.sequence_lengths[documents].sum(dtype=np.int64))
        self._check_some(max(0, tokens - 1) // self.data.seq_length, selection.path)
        config = self._config(self.prefixes[which], seed, held_out=False)
        # megatron-core's cache key does not hold which documents it indexes.
        config.path_to_cache = f"{config.path_to_cache}-{selection.fingerprint}"
        with self._naming_the_cache():
            epoch = BlendedMegatronDatasetBuilder.build_generic_dataset(
                CheckedDataset, lambda: True, True, gpt.dataset, self.prefixes[which], documents,
                None, Split.train, config,
            )  # fmt: skip
        tags = self.tags[which]
        return self._with_places(epoch if tags is None else TaggedDataset(epoch, tags), epoch)

    def _check_some(self, samples: int, source: str | Path) -> None:
        if samples == 0:
            raise ValueError(
                f"{source}: the selected sequences in the training part of the data do not "
                f"fill one sample of data.seq_length = {self.data.seq_length} tokens; select more"
            )

    def _held_out(self, train_prefixes: Sequence[str]) -> list[CheckedDataset]:
        found = []
        for prefix in self.data.valid_data_path or train_prefixes:
            valid = self._build(self._config(prefix, EVALUATION_SEED, held_out=True))[1]
            if valid is None or len(valid) == 0:
                raise ValueError(
                    f"{prefix}: the held-out part holds no sequence of data.seq_length = "
                    f"{self.data.seq_length} tokens; take shorter ones (`evaluate`: --seq_length), "
                    f"or give data.valid_data_path or a larger second share in data.split = "
                    f"{self.data.split!r}"
                )
            found.append(valid)
        return found

    def read(self, rows: Sequence[int], phase: Phase = "lm") -> Batch:
        """Rows of a step, each with its objective: of the selected sequences in the KD phase, if
        there is a selection.

        Raises: ValueError naming dataset, row and id, for an id beyond the vocabulary.
        """
        order = self.selected if phase == "kd" and self.selected is not None else self.train
        samples = [order[row] for row in rows]
        which = [order.dataset_index[row] if len(self.prefixes) > 1 else 0 for row in rows]
        if phase == "kd" and self.logits:
            samples = [self._with_logits(x, i) for x, i in zip(samples, which, strict=True)]
        if "window" in samples[0]:
            samples = [
                {**x, "source": torch.tensor(i)} for x, i in zip(samples, which, strict=True)
            ]
        batch = _stack(samples)
        self._check_ids(batch, "training", rows, [self.prefixes[i] for i in which])
        return batch if self.mixture is None else _apply(self.mixture, batch, rows)

    def _with_logits(self, sample: SampleFields, which: int) -> SampleFields:
        stored = self.logits[which].of_places(sample["places"].numpy())
        loss = stored.pop("logits_loss")
        return {**sample, **stored, "reference_loss": loss}

    def num_held_out(self) -> int:
        return min(len(valid) for valid in self.valid) * len(self.valid)

    def read_held_out(self, rows: Sequence[int]) -> Batch:
        """Held-out rows, taken in turn from each held-out dataset; row -1 counts for nothing.

        Raises: as `read` does.
        """
        samples = []
        for row in rows:
            index, which = divmod(max(row, 0), len(self.valid))
            sample = dict(self.valid[which][index])
            if self.valid_parts.names:
                length = len(sample["labels"])
                sample["part"] = self.valid_parts.of_labels(which, index, length)
            if row < 0:
                sample["loss_mask"] = torch.zeros_like(sample["loss_mask"])
            samples.append(sample)
        batch, names = _stack(samples), self.valid_prefixes
        self._check_ids(batch, "held-out", rows, [names[max(row, 0) % len(names)] for row in rows])
        return batch

    def _check_ids(
        self, batch: Batch, kind: str, rows: Sequence[int], prefixes: Sequence[str]
    ) -> None:
        """Raise ValueError for an id, of an input or a label, that is no token's.

        Here, where the batch is on the CPU: CUDA's assertion names nothing and ends the process.
        """
        size = self.tokenizer.vocab_size
        text_RS = torch.cat([batch.tokens_RS, batch.labels_RS[:, -1:]], dim=1)
        lowest, highest = torch.aminmax(text_RS)
        if lowest >= 0 and highest < size:
            return
        place, position = ((text_RS < 0) | (text_RS >= size)).nonzero()[0].tolist()
        raise ValueError(
            f"{prefixes[place]}.bin: {kind} row {rows[place]} holds id {text_RS[place, position]} "
            f"at position {position}, the tokenizer {self.tokenizer.path} has {size} tokens: name "
            "the one that made the dataset (data.tokenizer); if it is this one the file is "
            "damaged, preprocess the text again"
        )

    def fingerprints(self) -> list[str]:
        """Identity of each training dataset, to notice at a resume that the data changed."""
        return [dataset_fingerprint(prefix) for prefix in self.prefixes]

    def evaluation_fingerprint(self, num_samples: int) -> str:
        """Identity of the held-out samples that an evaluation scores."""
        parts = [dataset_fingerprint(prefix) for prefix in self.valid_prefixes]
        total = min(num_samples, self.num_held_out())
        held_out = [bool(self.data.valid_data_path), self._split(True), EVALUATION_SEED]
        text = repr((parts, held_out, self.data.seq_length, self.data.eod_mask_loss, total))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def epochs_needed(self) -> list[str]:
        """How often each dataset is read over the run, as lines for people."""
        num_samples, num_selected = self.num_samples, self.num_selected
        lines = []
        for which, (prefix, share) in enumerate(zip(self.prefixes, self.shares, strict=True)):
            per_epoch = self.parts[which].samples_per_epoch
            if not self.selections:
                lines.append(f"{prefix}, {share * num_samples / per_epoch:.2f} epochs over the run")
                continue
            chosen = self.selected_parts[which].samples_per_epoch
            later = share * (num_samples - num_selected) / per_epoch
            lines.append(
                f"{prefix}, KD phase: {len(self.selections[which].sequences)} selected sequences "
                f"make {chosen} samples ({per_epoch} in all), "
                f"{share * num_selected / chosen:.2f} epochs; LM phase: {later:.2f} epochs of "
                "everything"
            )
        return lines


def dataset_fingerprint(prefix: str) -> str:
    """Short hash of a dataset: the token file's hash from its manifest, else its size and times."""
    manifest = read_dataset_manifest(prefix)
    if manifest is not None:
        text = manifest.bin_sha256 + manifest.idx_sha256
    else:
        stats = [Path(f"{prefix}{suffix}").stat() for suffix in (".bin", ".idx")]
        text = repr([(stat.st_size, stat.st_mtime_ns) for stat in stats])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


OPTIONAL_FIELDS = {
    "tag_RS": "tag", "reference_loss_RS": "reference_loss", "part_RS": "part",
    "logits_ids_RSK": "logits_ids", "logits_logp_RSK": "logits_logp",
    "logits_rest_RS": "logits_rest", "logits_entropy_RS": "logits_entropy",
    "window_R": "window", "source_R": "source",
}  # fmt: skip
"""Fields of a batch that only some samples have, and what the samples call them."""


def _stack(samples: Sequence[dict[str, Tensor]]) -> Batch:
    """torch.stack copies, so nobody can write into the dataset's cached masks."""

    def stacked(name: str) -> Tensor:
        return torch.stack([sample[name] for sample in samples])

    return Batch(
        tokens_RS=stacked("tokens"), labels_RS=stacked("labels"),
        mask_RS=stacked("loss_mask").float(),
        **{name: stacked(key) for name, key in OPTIONAL_FIELDS.items() if key in samples[0]},
    )  # fmt: skip


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
