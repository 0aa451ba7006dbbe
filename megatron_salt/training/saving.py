"""Saving a run: what goes into a checkpoint, in which order, and who writes it."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from megatron_salt.checkpoint import folder, manifest
from megatron_salt.checkpoint.optimizer import OPTIMIZER_INDEX, write_optimizer_index
from megatron_salt.config.fields import RunConfig
from megatron_salt.evaluation.held_out import HeldOut
from megatron_salt.files.disk import save_tensors
from megatron_salt.parallel.groups import same_error_everywhere
from megatron_salt.training.console import Console
from megatron_salt.training.engine import StudentEngine
from megatron_salt.training.gradients import not_finite
from megatron_salt.training.kd_phase import KdPhase
from megatron_salt.training.metrics import MetricsLog
from megatron_salt.training.resume import check_still_there
from megatron_salt.training.state import HostCopies, RankState, capture, loss_scaler


@dataclass(frozen=True)
class _Save:
    """A checkpoint that is being written in the background."""

    partial: Path
    about: manifest.CheckpointManifest
    """All but the files; as it was when the weights were copied."""
    state: RankState
    records: Future[dict[str, dict[str, Any]]]
    """Of this rank's files, when they are durable."""


@dataclass(eq=False)
class Saver:
    """Makes checkpoints: copies at a step's end, writes behind the next steps, publishes when every
    rank's part is durable.

    At most one is being written. Ranks tell each other in the sums that each step adds up anyway:
    there is no collective in the background.
    """

    config: RunConfig
    student: StudentEngine
    held_out: HeldOut
    kd: KdPhase
    init_fingerprint: str | None
    log: MetricsLog | None
    console: Console
    lock: IO[str] | None

    def __post_init__(self) -> None:
        self.output_dir = Path(self.config.train.output_dir)
        self._copies = HostCopies(self.student.groups.device)
        self.student.before_update = self._copies.wait
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._save: _Save | None = None
        self._removal: Future[list[str]] | None = None

    def save(
        self, done: int, tokens: int, evaluation: manifest.Evaluation | None, teacher: str | None
    ) -> None:
        """Begin a checkpoint after `done` steps; see `checkpoint/folder.py` for its form.

        Args:
            teacher: fingerprint of the weights of the teacher that there is, or was.
        Raises: OSError on the rank that could not write (a full disk, say), RuntimeError on the
            others; here for what fails at once, else from `look` or `drain`. RuntimeError on all
            ranks for a weight that is not finite. The newest complete checkpoint is untouched.
        """
        self.drain()
        groups = self.student.groups
        partial = folder.partial_dir(self.output_dir, done)
        with same_error_everywhere("checking the weights"):
            problem = not_finite(self.student.module, groups)
            if problem:
                raise RuntimeError(
                    f"step {done}: {problem}: no checkpoint is made of it. "
                    f"The last good one is the newest in {folder.checkpoints_dir(self.output_dir)};"
                    " look at the learning rate and the gradient norms before this step"
                )
        with same_error_everywhere("starting a checkpoint"):
            if groups.rank == 0:
                self._end_removal()
                check_still_there(self.output_dir, self.lock)
                folder.start_partial(self.output_dir, done)
                self.held_out.data.tokenizer.save(partial / "tokenizer")
                settings = json.dumps(dict(self.student.settings.values), indent=2)
                (partial / "deepspeed.json").write_text(settings, encoding="utf-8")
                self.held_out.write(partial)
                if self.log:
                    self.log.sync()
        written = folder.list_files(partial) if groups.rank == 0 else []
        state = capture(self.student, self._copies)
        self._check_room(partial, state.num_bytes)
        about = self._manifest(done, evaluation, tokens=tokens, teacher_fingerprint=teacher)
        records = self._writer.submit(self._write, partial, state, written)
        self._save = _Save(partial, about, state, records)
        if not self.config.train.async_save:
            self.drain()
            self._copies.free()

    def flags(self) -> tuple[float, float]:
        """(my part is durable, my part failed), to be added up over all ranks in a step's sums."""
        if self._save is None or not self._save.records.done():
            return 0.0, 0.0
        failed = self._save.records.exception() is not None
        return float(not failed), float(failed)

    def look(self, durable: float, failed: float) -> None:
        """Publish the checkpoint if all ranks' parts are durable.

        Args: durable, failed: `flags`, added up.
        Raises: as `drain`, on all ranks after the same step, if a part failed.
        """
        if failed or durable == self.student.groups.layout.world_size:
            self.drain()

    def drain(self) -> None:
        """Wait for the checkpoint that is being written, if there is one, and publish it.

        Collectives: a few small ones, if there is one.
        Raises: OSError on the rank that could not write, RuntimeError on the others.
        """
        save, self._save = self._save, None
        if save is None:
            return
        groups = self.student.groups
        with same_error_everywhere("writing a checkpoint"):
            check_still_there(self.output_dir, self.lock)  # else errors of files would say it
            records = save.records.result()
        parts: list[Any] | None = None
        if groups.rank == 0:
            parts = [None] * groups.layout.world_size
        dist.gather_object((records, save.state.part, save.state.states, save.state.scalars), parts)
        with same_error_everywhere("publishing a checkpoint"):
            if parts is not None:
                self._publish(save, parts)

    def close(self) -> None:
        """After the last step: the last checkpoint is there, and what it replaces is gone."""
        self.drain()
        self._end_removal()
        self._writer.shutdown()

    def _end_removal(self) -> None:
        """Wait until older checkpoints are gone, and say which could not be deleted."""
        if self._removal is not None:
            self.console.warn(self._removal.result())
            self._removal = None

    def _write(
        self, partial: Path, state: RankState, written: list[str]
    ) -> dict[str, dict[str, Any]]:
        """In the background: write this rank's tensors; flush them and what is `written` already,
        read all back and hash it."""
        self._copies.finish()
        try:
            for name, tensors in state.files.items():
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                save_tensors(partial / name, tensors)
            return folder.hash_files(partial, [*written, *state.files])
        except (OSError, SafetensorError) as error:
            raise OSError(f"{partial} cannot be written: {error}; {_room(partial)}") from error

    def _check_room(self, partial: Path, num_bytes: int) -> None:
        """Raise OSError on all ranks where the disk has no room for the tensors of all ranks.

        Collectives: an all-reduce of one number over all ranks.
        """
        needed = torch.tensor(
            float(num_bytes), dtype=torch.float64, device=self.student.groups.device
        )
        dist.all_reduce(needed)
        with same_error_everywhere("making room for a checkpoint"):
            if self.student.groups.rank == 0 and needed.item() > shutil.disk_usage(partial).free:
                raise OSError(
                    f"{partial}: a checkpoint takes {int(needed):,} bytes, and {_room(partial)}: "
                    "free some, or lower train.keep_checkpoints; the newest one is untouched"
                )

    def _publish(self, save: _Save, parts: list[Any]) -> None:
        """On rank 0: index, manifest and name; then older ones go."""
        records, written, states, scalars = zip(*parts, strict=True)
        model = save.about.model
        write_optimizer_index(save.partial, model, written, states, scalars)
        files = {name: record for each in records for name, record in each.items()}
        files |= folder.hash_files(save.partial, [OPTIMIZER_INDEX])
        about = replace(save.about, files=dict(sorted(files.items())))
        self.console.say(f"saved {folder.publish(save.partial, about, self.output_dir)}")
        keep = self.config.train.keep_checkpoints
        self._removal = self._writer.submit(folder.remove_old, self.output_dir, keep)

    def _manifest(
        self, step: int, evaluation: manifest.Evaluation | None, **known: Any
    ) -> manifest.CheckpointManifest:
        """All but the files."""
        config, data, scores = self.config, self.held_out.data, self.held_out.teacher
        settings, layout = self.student.settings, self.student.groups.layout
        tags, selection = data.tag_inputs.fingerprints()
        model = manifest.ModelRecord(
            name=f"{Path(config.train.output_dir).name}/{folder.step_name(step)}", step=step,
            config=config.model, vocab_size=data.tokenizer.vocab_size,
            num_positions=config.num_positions, seq_length=config.data.seq_length,
            objective=list(config.data.objective),
            tokenizer_fingerprint=data.tokenizer.fingerprint, precision=settings.precision,
            tp_size=layout.tp_size, pp_size=layout.pp_size, evaluation=evaluation,
        )  # fmt: skip
        run = manifest.RunRecord(
            config=config, step=step, phase=self.kd.phase(step),
            data_rows=step * settings.global_batch_size, data=data.fingerprints(),
            dp_size=layout.dp_size, zero_stage=settings.zero_stage,
            teacher_valid_ce_nats=scores.ce_nats if scores else None,
            tags=tags, selection=selection, switch=self.kd.state,
            loss_scaler=loss_scaler(self.student),
            skipped_steps=self.student.engine.skipped_steps,
            init_fingerprint=self.init_fingerprint, **known,
        )  # fmt: skip
        versions = manifest.installed_versions()
        return manifest.CheckpointManifest(model=model, training=run, versions=versions, files={})


def _room(partial: Path) -> str:
    if not partial.exists():
        return "the folder is gone"
    return f"its disk has {shutil.disk_usage(partial).free:,} bytes free"
