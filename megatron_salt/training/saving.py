"""Saving a run: what goes into a checkpoint, in which order, and who writes it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_salt.checkpoint import folder, manifest
from megatron_salt.config.fields import RunConfig
from megatron_salt.evaluation.held_out import HeldOut
from megatron_salt.parallel.groups import from_rank_0, same_error_everywhere
from megatron_salt.training.console import Console
from megatron_salt.training.engine import StudentEngine
from megatron_salt.training.gradients import not_finite
from megatron_salt.training.kd_phase import KdPhase
from megatron_salt.training.metrics import MetricsLog


@dataclass(frozen=True)
class Saver:
    """What a checkpoint is made of."""

    config: RunConfig
    student: StudentEngine
    held_out: HeldOut
    kd: KdPhase
    init_fingerprint: str | None
    log: MetricsLog | None
    console: Console

    def save(
        self, done: int, tokens: int, evaluation: manifest.Evaluation | None, teacher: str | None
    ) -> Path:
        """Write a checkpoint after `done` steps; see `checkpoint/folder.py` for its form.

        Args:
            teacher: fingerprint of the weights of the teacher that there is, or was.
        Raises: OSError on the rank that could not write (a full disk, say); the others end with
            RuntimeError or the launcher ends them. RuntimeError on all ranks for a weight that is
            not finite. The newest complete checkpoint is untouched.
        """
        groups, output_dir = self.student.groups, Path(self.config.train.output_dir)
        partial = folder.partial_dir(output_dir, done)
        with same_error_everywhere("checking the weights"):
            problem = not_finite(self.student.module, groups)
            if problem:
                raise RuntimeError(
                    f"step {done}: {problem}: no checkpoint is made of it. "
                    f"The last good one is the newest in {folder.checkpoints_dir(output_dir)}; "
                    "look at the learning rate and the gradient norms before this step"
                )
        with same_error_everywhere("starting a checkpoint"):
            if groups.rank == 0:
                folder.start_partial(output_dir, done)
                self.held_out.data.tokenizer.save(partial / "tokenizer")
                text = json.dumps(dict(self.student.settings.values), indent=2)
                (partial / "deepspeed.json").write_text(text, encoding="utf-8")
                self.held_out.write(partial)
                if self.log:
                    self.log.sync()
        self.student.save(partial)
        dist.barrier()  # every file is there before any is read back
        records: list[dict[str, Any]] = [{}] * groups.layout.world_size
        names = from_rank_0(folder.list_files(partial) if groups.rank == 0 else None)
        with same_error_everywhere("verifying a checkpoint"):
            mine = folder.hash_files(partial, names[groups.rank :: groups.layout.world_size])
        dist.all_gather_object(records, mine)
        with same_error_everywhere("publishing a checkpoint"):
            if groups.rank == 0:
                files = dict(sorted(pair for part in records for pair in part.items()))
                about = self._manifest(
                    done, files, evaluation, tokens=tokens, teacher_fingerprint=teacher
                )
                self.console.say(f"saved {folder.publish(partial, about, output_dir)}")
                keep = self.config.train.keep_checkpoints
                self.console.warn(folder.remove_old(output_dir, keep))
        return folder.checkpoints_dir(output_dir) / folder.step_name(done)

    def _manifest(
        self, step: int, files: dict[str, Any], evaluation: manifest.Evaluation | None, **known: Any
    ) -> manifest.CheckpointManifest:
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
            init_fingerprint=self.init_fingerprint, **known,
        )  # fmt: skip
        versions = manifest.installed_versions()
        return manifest.CheckpointManifest(
            model=model, training=run, versions=versions, files=files
        )
