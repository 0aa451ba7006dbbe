"""train.cache_logits: what the student that trains says of the rows it is about to learn.

A later student can be taught by it as by any stored logits. Letters: R rows of a step, S sequence,
K kept tokens.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from megatron_salt.checkpoint.folder import list_checkpoints
from megatron_salt.checkpoint.manifest import (
    installed_versions,
    read_checkpoint_manifest,
    weights_fingerprint,
)
from megatron_salt.config.fields import RunConfig
from megatron_salt.data.dataset import Batch, DataSource
from megatron_salt.data.logits import (
    LogitsOrigin,
    LogitsSettings,
    encode_logits,
    logits_manifest_path,
)
from megatron_salt.data.logits_log import LogitsLog, join_logs
from megatron_salt.data.tags import DataIdentity, ModelIdentity
from megatron_salt.kernels import Distributions
from megatron_salt.model.loss import by_sample
from megatron_salt.parallel.groups import same_error_everywhere
from megatron_salt.training.console import Console
from megatron_salt.training.engine import StudentEngine


def check_not_there(config: RunConfig) -> None:
    """Raise ValueError where complete logits would be overwritten."""
    for prefix in config.train.cache_logits:
        if (path := logits_manifest_path(prefix)).exists():
            raise ValueError(
                f"train.cache_logits: {path} is there already: name another prefix, or delete it"
            )


class StudentLogits:
    """The logs of a run's datasets; on tensor-parallel rank 0 of the last stage, of its rows."""

    def __init__(
        self, config: RunConfig, data: DataSource, student: StudentEngine, first_step: int
    ) -> None:
        self.config, self.data, self.student = config, data, student
        groups, settings = student.groups, student.settings
        vocab_size = data.tokenizer.vocab_size
        self.settings = LogitsSettings(
            context="window", max_length=config.data.seq_length, kind="top",
            top_k=min(config.train.cache_logits_top_k, vocab_size), top_p=1.0, draws=0, seed=0,
            encoding="fp16", precision=settings.precision, vocab_size=vocab_size,
        )  # fmt: skip
        self.logs: list[LogitsLog] = []
        if groups.is_last_stage:
            student.loss_function.capture_top_k = self.settings.top_k
            if groups.tp_rank == 0:
                self.logs = [
                    LogitsLog(
                        _partial(prefix) / f"rank_{groups.dp_rank:05d}", self.settings,
                        config.train.output_dir, first_step,
                    )
                    for prefix in config.train.cache_logits
                ]  # fmt: skip

    def write(self, step: int, batch: Batch) -> None:
        """Append what the step's forward passes have captured."""
        captured = self.student.loss_function.take_captured()
        if not self.logs:
            return
        assert batch.window_R is not None and batch.source_R is not None  # rows are windows
        size = self.student.settings.micro_batch_size
        of_fields = [
            torch.cat([by_sample(x, size).flatten(0, 1) for x in field]).cpu()
            for field in zip(*captured, strict=True)
        ]
        found = Distributions(*(x.unflatten(0, (len(batch.window_R), -1)) for x in of_fields))
        for which, log in enumerate(self.logs):
            mine_R = (batch.source_R == which).cpu()
            ids, values, rest, entropy, loss = (x[mine_R].flatten(0, 1).numpy() for x in found)
            of_token = {"rest": rest, "entropy": entropy, "loss": loss}
            windows_R = batch.window_R.cpu()[mine_R].numpy()
            log.write(step, windows_R, encode_logits(self.settings, ids, values, of_token))

    def finish(self, console: Console) -> None:
        """After the last step: what all ranks have written becomes stored logits.

        Collectives: a barrier.
        """
        for log in self.logs:
            log.close()
        dist.barrier()
        with same_error_everywhere("joining the logits of all ranks"):
            if self.student.groups.rank == 0:
                for prefix, data in zip(
                    self.config.train.cache_logits, self.data.prefixes, strict=True
                ):
                    console.say(self._publish(prefix, data))

    def _publish(self, prefix: str, data: str) -> str:
        last = list_checkpoints(self.config.train.output_dir)[-1]
        manifest = read_checkpoint_manifest(last)
        folders = sorted(_partial(prefix).glob("rank_*"))
        # Its first step: those who learn from them at a high weight are warned by it.
        model = ModelIdentity(
            fingerprint=weights_fingerprint(manifest), step=0, name=manifest.model.name
        )
        origin = LogitsOrigin(
            data=DataIdentity.of(data), model=model, planned_steps=self.config.train.steps,
            tokenizer_fingerprint=self.data.tokenizer.fingerprint, settings=self.settings,
        )  # fmt: skip
        found = join_logs(prefix, folders, origin, installed_versions())
        _partial(prefix).rmdir()
        return f"{prefix}: logits of {found.windows:,} windows, {found.entries:,} entries"


def _partial(prefix: str) -> Path:
    # Not the folder of `cache-logits`, which removes its own when it is done.
    return Path(f"{prefix}.logits.log")
