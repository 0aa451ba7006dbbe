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
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split
from torch import Tensor

from megatron_salt.config.fields import DataConfig, RunConfig
from megatron_salt.config.values import check_split, parse_blend
from megatron_salt.data.epochs import Epoch, EpochedDataset, TaggedDataset, Tags, WindowDataset
from megatron_salt.data.manifest import (
    check_exists,
    read_dataset_manifest,
    tokenizer_directory,
    verify_dataset,
)
from megatron_salt.data.objective import Mixture, make_mixture
from megatron_salt.data.order import epoch_seed
from megatron_salt.data.parts import HeldOutParts
from megatron_salt.data.selection import Selection, check_same_origin, load_selection, rule_text
from megatron_salt.data.sources import load_sources
from megatron_salt.data.tags import TagManifest, tag_manifest_path, verify_tags
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
    """The tagging model's loss on the label, nats, fp32; where a run reads it."""
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


@dataclass(frozen=True, kw_only=True)
class TagInputs:
    """The tags and selections of a run's training datasets, verified; empty where it has none."""

    tags: tuple[TagManifest, ...] = ()
    selections: tuple[Selection, ...] = ()

    def fingerprints(self) -> tuple[list[str], list[str]]:
        """Identities of tags and selections, to notice at a resume that they changed."""
        return [x.fingerprint for x in self.tags], [x.fingerprint for x in self.selections]

    def describe(self) -> list[str]:
        """Who tagged and by which rule was selected, as lines for people."""
        lines = []
        for tags in self.tags:
            data, model = tags.origin.data, tags.origin.model
            lines.append(f"tags of {data.name} by {model.name}, step {model.step}")
        for chosen in self.selections:
            by = chosen.origin.model.name
            lines.append(f"selection {chosen.path}: {rule_text(chosen.rule)}, by {by}")
        return lines


def load_tag_inputs(config: RunConfig, tokenizer: Tokenizer) -> TagInputs:
    """Read and check what config.data.tags and config.salt.selection name.

    Raises: ValueError naming the files that do not belong together, and the remedy.
    """
    data, salt = config.data, config.salt
    prefixes = parse_blend(data.train_data_path, "data.train_data_path")[0]
    tags, selections = [], []
    for prefix, tagged in zip(prefixes, data.tags, strict=False):
        tags.append(verify_tags(tagged, prefix, tokenizer.fingerprint))
        if reads_reference_loss(config) and "loss" not in tags[-1].stored:
            raise ValueError(
                f"salt.ce_tokens = excess_loss without a teacher reads the losses of {tagged}, "
                "which has none: tag with --store loss"
            )
    for prefix, path in zip(prefixes, salt.selection, strict=False):
        selection = load_selection(path, prefix, tokenizer.fingerprint)
        if selection.window not in (None, data.seq_length):
            raise ValueError(
                f"{path} selects windows of {selection.window} tokens, data.seq_length is "
                f"{data.seq_length}: the sequences that were scored are those to train on; make "
                "the two equal, or tag documents"
            )
        selections.append(selection)
    if tags and selections:
        for tagged, manifest, selection in zip(data.tags, tags, selections, strict=True):
            check_same_origin(selection, manifest.origin, tag_manifest_path(tagged))
    return TagInputs(tags=tuple(tags), selections=tuple(selections))


def reads_reference_loss(config: RunConfig) -> bool:
    """Whether losses of the tags are read: a teacher in memory computes its own."""
    return config.salt.ce_tokens == "excess_loss" and config.teacher.path is None


def reads_tags(config: RunConfig) -> bool:
    """Whether any route goes by data.tags."""
    routes = {config.salt.kd_tokens, config.salt.ce_tokens}
    return not routes.isdisjoint({"tagged", "untagged"}) or reads_reference_loss(config)


class DataSource:
    """Reads the rows of a step or of an evaluation. Every rank can read any row.

    There are two endless orders: of all training data, and, with a selection, of the selected
    sequences, which the KD phase reads. A row means the same in both: step times global batch size.

    Args:
        num_samples: rows the run needs in all; decides how many epochs are indexed, not the order.
        num_selected: rows of the KD phase, the first ones.
        cache_path: folder for index files, shared by all ranks; rank 0 writes, the others map.
        tag_inputs: tags and selections, if the run has any.
        with_reference_loss: read the losses of the tags.
        held_out_only: index no training data.
    """

    def __init__(
        self, data: DataConfig, tokenizer: Tokenizer, *, num_samples: int, seed: int,
        cache_path: Path, num_selected: int = 0, tag_inputs: TagInputs | None = None,
        with_reference_loss: bool = False, held_out_only: bool = False,
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
        if self.selections:
            self.selected = self._order(num_selected, self.selected_parts, self._selected_epoch)

    def _order(
        self, num_samples: int, parts: list[EpochedDataset],
        build_epoch: Callable[[int, int], Epoch],
    ) -> EpochedDataset | BlendedDataset:  # fmt: skip
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
        blended = BlendedDataset(parts, self.shares, num_samples, config)
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

    def _build(self, config: GPTDatasetConfig) -> list[GPTDataset | None]:
        """One epoch of the part asked for; collective (rank 0 writes the index files first)."""
        builder = BlendedMegatronDatasetBuilder(GPTDataset, [None] * 3, lambda: True, config)
        with self._naming_the_cache():
            return builder.build()

    @contextlib.contextmanager
    def _naming_the_cache(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(
                f"data.cache_path {self.cache_path}: an index file cannot be built or read "
                f"({error}); if an earlier start was killed while writing it, delete the folder"
            ) from error

    def _gpt_epoch(self, which: int, seed: int) -> GPTDataset:
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
        epoch, tags = self._gpt_epoch(which, seed), self.tags[which]
        return epoch if tags is None else TaggedDataset(epoch, tags)

    def _selected_epoch(self, which: int, seed: int) -> Epoch:
        """The selected sequences of a dataset's training part, once."""
        selection, prefix = self.selections[which], self.prefixes[which]
        whole = self.parts[which].epochs[0]
        gpt: GPTDataset = whole.epoch if isinstance(whole, TaggedDataset) else whole
        if selection.window is not None:
            # The training part is the first documents of the file, so the first tokens.
            lengths = gpt.dataset.sequence_lengths
            num_tokens = int(lengths[: len(gpt.indices)].sum(dtype=np.int64))
            windows = selection.sequences
            whole_ones = windows[(windows + 1) * selection.window <= num_tokens]
            self._check_some(len(whole_ones), selection)
            return WindowDataset(
                gpt.dataset, whole_ones, window=selection.window, seed=seed,
                eod=self.tokenizer.eod, eod_mask_loss=self.data.eod_mask_loss,
                tags=self.tags[which], identity=selection.fingerprint,
            )  # fmt: skip
        documents = np.intersect1d(gpt.indices, selection.sequences).astype(gpt.indices.dtype)
        tokens = int(gpt.dataset.sequence_lengths[documents].sum(dtype=np.int64))
        self._check_some(max(0, tokens - 1) // self.data.seq_length, selection)
        config = self._config(prefix, seed, held_out=False)
        # megatron-core's cache key does not hold which documents it indexes.
        config.path_to_cache = f"{config.path_to_cache}-{selection.fingerprint}"
        with self._naming_the_cache():
            epoch = BlendedMegatronDatasetBuilder.build_generic_dataset(
                GPTDataset, lambda: True, True, gpt.dataset, prefix, documents, None, Split.train,
                config,
            )  # fmt: skip
        tags = self.tags[which]
        return epoch if tags is None else TaggedDataset(epoch, tags)

    def _check_some(self, samples: int, selection: Selection) -> None:
        if samples == 0:
            raise ValueError(
                f"{selection.path}: the selected sequences in the training part of the data do not "
                f"fill one sample of data.seq_length = {self.data.seq_length} tokens; select more"
            )

    def _held_out(self, train_prefixes: Sequence[str]) -> list[GPTDataset]:
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
        batch = _stack([order[row] for row in rows])
        which = [order.dataset_index[row] if len(self.prefixes) > 1 else 0 for row in rows]
        self._check_ids(batch, "training", rows, [self.prefixes[i] for i in which])
        return batch if self.mixture is None else _apply(self.mixture, batch, rows)

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


def _stack(samples: Sequence[dict[str, Tensor]]) -> Batch:
    """torch.stack copies, so nobody can write into the dataset's cached masks."""

    def stacked(name: str) -> Tensor:
        return torch.stack([sample[name] for sample in samples])

    return Batch(
        tokens_RS=stacked("tokens"), labels_RS=stacked("labels"),
        mask_RS=stacked("loss_mask").float(),
        tag_RS=stacked("tag") if "tag" in samples[0] else None,
        reference_loss_RS=stacked("reference_loss") if "reference_loss" in samples[0] else None,
        part_RS=stacked("part") if "part" in samples[0] else None,
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
