"""What must hold before a run starts or goes on: no run is overwritten, a resume is exact."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from megatron_salt.checkpoint import folder
from megatron_salt.checkpoint.manifest import CheckpointManifest, read_checkpoint_manifest
from megatron_salt.config.deepspeed import DeepSpeedSettings, read_json
from megatron_salt.config.fields import DataConfig, RunConfig
from megatron_salt.config.values import effective_split, parse_blend, parse_objective
from megatron_salt.data.tag_inputs import TagInputs
from megatron_salt.files.disk import lock_file
from megatron_salt.method.switch import carried_over, effective
from megatron_salt.training.learning_rate import learning_rate

LOCK_WAIT_S = 120.0
# Settings that a run which is done may change: nothing that was trained depends on them.
NOT_TRAINED = ("train.steps:", "train.resume:", "train.log_interval:", "train.eval_interval:",
               "train.checkpoint_interval:", "train.keep_checkpoints:", "train.tensorboard:",
               "train.allow_lr_jump:", "train.check_gradients:", "train.output_dir:",
               "train.export_hf:", "data.cache_path:", "parallel.timeout_minutes:")  # fmt: skip


def changed_settings(before: RunConfig, now: RunConfig) -> list[str]:
    """`section.field: old -> new` for every setting that differs; what a resume should tell."""
    old, new = before.to_dict(), now.to_dict()
    return [
        f"{section}.{field}: {old[section][field]} -> {value}"
        for section, values in new.items()
        for field, value in values.items()
        if old[section][field] != value
    ]


def lock_output_dir(output_dir: str, say: Callable[[str], None]) -> IO[str]:
    """Claim a run's output_dir as long as the returned file stays open; a requeued job waits.

    Raises: ValueError if another run holds it, or the path is a file.
    """
    if Path(output_dir).exists() and not Path(output_dir).is_dir():
        raise ValueError(f"train.output_dir = {output_dir} is a file: name a folder")
    busy = (
        f"train.output_dir = {output_dir} is in use by another run; end that one, or choose "
        "another output_dir"
    )
    wait = f"another run holds {output_dir}: waiting up to {LOCK_WAIT_S:.0f} s for its end"
    return lock_file(
        Path(output_dir) / ".lock", busy=busy, wait_s=LOCK_WAIT_S, on_wait=lambda: say(wait)
    )


def check_still_there(output_dir: Path, lock: IO[str] | None) -> None:
    """Raise FileNotFoundError if output_dir is not the folder any more that the run has claimed.

    Else a run whose folder was moved away would write checkpoints beside another one's.
    """
    try:
        same = lock is None or os.path.samestat(
            os.fstat(lock.fileno()), (output_dir / ".lock").stat()
        )
    except FileNotFoundError:
        same = False
    if not same:
        raise FileNotFoundError(
            f"train.output_dir = {output_dir} has been deleted, moved or replaced while the run "
            "wrote to it: nothing more is written; move it back and start again"
        )


def decide_start(
    config: RunConfig,
    settings: DeepSpeedSettings,
    tokenizer_fingerprint: str,
    damaged: Mapping[str, str],
) -> tuple[Path | None, CheckpointManifest | None, list[str]]:
    """What the run starts from, with warnings about checkpoints that were passed over.

    For rank 0 alone, which tells the others.
    Args: damaged: as `folder.find_resume`.
    Raises: ValueError naming the file or setting that is wrong.
    """
    resume_from, warnings = folder.find_resume(
        config.train.output_dir, config.train.resume, damaged
    )
    resumed = read_checkpoint_manifest(resume_from) if resume_from else None
    check_start(config, settings, tokenizer_fingerprint, resume_from, resumed)
    return resume_from, resumed, warnings


def check_start(
    config: RunConfig,
    settings: DeepSpeedSettings,
    tokenizer_fingerprint: str,
    resume_from: Path | None,
    resumed: CheckpointManifest | None,
) -> None:
    """Raise ValueError where starting would overwrite a run or a resume would not continue it.

    Precision, tokenizer, model, batch size, seed and what decides the order of the data must be the
    checkpoint's. Layout, method and learning rate may change, and it is said (`changed_settings`).
    """
    output_dir = Path(config.train.output_dir)
    existing = folder.list_checkpoints(output_dir)
    if resumed is None:
        if existing:
            raise ValueError(
                f"train.output_dir = {output_dir} already has checkpoints and train.resume = "
                f"{config.train.resume}: choose another output_dir, or train.resume auto"
            )
        return
    if (
        existing
        and existing[-1].name > folder.step_name(resumed.run.step)
        and config.train.resume != "auto"
    ):
        raise ValueError(
            f"train.resume = {resume_from} is at step {resumed.run.step}, but train.output_dir = "
            f"{output_dir} has later checkpoints up to {existing[-1].name}, which a later resume "
            "would take for this run's: choose another output_dir, or move them away"
        )
    assert resume_from is not None
    try:
        _check_same_run(config, settings, tokenizer_fingerprint, resumed)
        _check_same_order(config, settings, resumed)
    except ValueError as error:
        raise ValueError(f"{resume_from}: {error}") from None
    deepspeed = read_json(str(resume_from / "deepspeed.json"))
    _check_deepspeed(deepspeed, settings)
    own = output_dir.resolve() in resume_from.resolve().parents
    if resumed.run.step < config.train.steps:
        _check_schedule(config, resumed, settings.learning_rate, own=own)
        return
    changed = changed_settings(resumed.run.config, config)
    found = changed_deepspeed(deepspeed, settings.values)  # of which the rest trains nothing
    changed += [each for each in found if each.startswith("optimizer:")]
    if own and (ignored := [each for each in changed if not each.startswith(NOT_TRAINED)]):
        raise ValueError(
            f"{resume_from} is at the end: nothing would be trained with what has changed "
            f"({'; '.join(ignored)}). Choose another train.output_dir, or a larger train.steps"
        )


def _check_schedule(
    config: RunConfig, resumed: CheckpointManifest, peak: float, *, own: bool
) -> None:
    """Raise ValueError where the learning rate would not go on as it was, or where the KD phase of
    this very run (`own`) would end in the past: one that starts from another run's checkpoint may
    be a plain one.

    Math: the new schedule must say of the last step done what the old one said, within 1 %.
    """
    before, now, step = resumed.run.config, config, resumed.run.step
    taught = min(before.salt.kd_steps, step)
    fixed = before.salt.switch == now.salt.switch == "fixed"
    if own and fixed and now.salt.kd_steps < taught:
        raise ValueError(
            f"salt.kd_steps = {now.salt.kd_steps}, but {taught} steps of the KD phase are done and "
            f"cannot change: give {taught} to end it here, or keep {before.salt.kd_steps}"
        )
    was = learning_rate(before.train, peak, step - 1)
    would = learning_rate(now.train, peak, step - 1)
    if abs(would - was) > 0.01 * max(was, would) and not now.train.allow_lr_jump:
        changes = [line for line in changed_settings(before, now) if line.startswith("train.")]
        length = before.train.lr_decay_steps or before.train.steps - before.train.lr_warmup_steps
        keep = ""
        if before.train.lr_schedule == now.train.lr_schedule == "cosine":
            keep = f"train.lr_decay_steps {length} keeps the old curve and then its floor; "
        raise ValueError(
            f"the learning rate would jump from {was:.3g} (step {step}) to "
            f"{learning_rate(now.train, peak, step):.3g} ({'; '.join(changes)}): {keep}"
            "--train.allow_lr_jump true accepts the jump"
        )


def _check_same_run(
    config: RunConfig,
    settings: DeepSpeedSettings,
    tokenizer_fingerprint: str,
    resumed: CheckpointManifest,
) -> None:
    """Raise ValueError if precision, tokenizer or model are not the checkpoint's."""
    model, run = resumed.model, resumed.run
    if model.tokenizer_fingerprint != tokenizer_fingerprint:
        raise ValueError(
            "the checkpoint was trained with another tokenizer than data.tokenizer: give its own "
            "(the folder tokenizer in the checkpoint), or choose another train.output_dir"
        )
    changes = changed_settings(run.config, config)
    shapes = ("model.", "data.seq_length:", "train.init_from:")
    wrong = [change for change in changes if change.startswith(shapes)]
    if wrong:
        raise ValueError(
            f"the checkpoint's model is not this run's: {'; '.join(wrong)}: give the same model, "
            "or choose another train.output_dir"
        )
    if model.precision != settings.precision:
        raise ValueError(
            f"{settings.path}: precision {settings.precision}, the checkpoint was trained in "
            f"{model.precision}: keep it, or choose another train.output_dir"
        )


def _check_same_order(
    config: RunConfig, settings: DeepSpeedSettings, resumed: CheckpointManifest
) -> None:
    """Raise ValueError if the run would not go on in the checkpoint's order of the data."""
    run = resumed.run
    rows = run.step * settings.global_batch_size
    if run.data_rows != rows:
        raise ValueError(
            f"the checkpoint has read {run.data_rows} sequences in {run.step} steps; with "
            f"train_batch_size = {settings.global_batch_size} this run would go on at sequence "
            f"{rows}: keep train_batch_size = {run.data_rows // max(run.step, 1)} in "
            f"{settings.path}, or choose another train.output_dir"
        )
    for (what, now, consequence), (_, before, _) in zip(
        _deciding_order(config), _deciding_order(run.config), strict=True
    ):
        if now != before:
            raise ValueError(f"{what} {now}, the checkpoint's is {before}: {consequence}")


def _deciding_order(config: RunConfig) -> list[tuple[str, object, str]]:
    """(setting, what it makes, what another one would change) of what rows and their order are."""
    data, order = config.data, "the order of the data would change"
    weights = parse_blend(data.train_data_path, "data.train_data_path")[1]
    return [
        ("data.split and data.valid_data_path: the training documents would be those of split",
         repr(effective_split(data)), order),
        ("data.windows =", data.windows, order),
        ("data.eod_mask_loss =", data.eod_mask_loss, "other tokens would count"),
        ("data.objective:", _objective(data),
         "rows would ask something else of the model; keep it, or start a new run"),
        ("data.train_data_path: blend weights", weights, order),
        ("train.seed =", config.train.seed, order),
    ]  # fmt: skip


def _objective(data: DataConfig) -> str:
    """What decides what is made of a row, in words; spans only where there are any."""
    shares = parse_objective(data.objective)
    text = ", ".join(f"{share:.6g} {name}" for name, share in shares.items())
    if "span_corruption" in shares:
        text += (
            f" (data.span_corruption_rate = {data.span_corruption_rate}, "
            f"data.span_mean_length = {data.span_mean_length})"
        )
    return text


def kd_phase_is_over(config: RunConfig, resumed: CheckpointManifest | None) -> bool:
    """Whether a run goes on in the LM phase; a new one (None) does not."""
    if resumed is None:
        return False
    switch = carried_over(resumed.run.switch, resumed.run.config.salt, config.salt)
    return resumed.run.step >= effective(config.salt, switch).kd_steps


def check_same_tag_inputs(
    config: RunConfig, resumed: CheckpointManifest, tag_inputs: TagInputs
) -> None:
    """Raise ValueError if the rest of the KD phase would read other sequences or other tags.

    Once the KD phase is over neither is read, and both may be left out.
    """
    if kd_phase_is_over(config, resumed):
        return
    logits = tag_inputs.teacher_fingerprint
    if logits and resumed.run.teacher_fingerprint not in (None, logits):
        raise ValueError(
            f"teacher.logits = {config.teacher.logits}: the KD phase of this run began with a "
            f"teacher of fingerprint {resumed.run.teacher_fingerprint}, these have {logits}: "
            "give the same, or start a new run"
        )
    tags, selection = tag_inputs.fingerprints()
    began = resumed.run.config
    for name, paths, before, now in (
        ("data.tags", began.data.tags, resumed.run.tags, tags),
        ("salt.selection", began.salt.selection, resumed.run.selection, selection),
    ):
        if before != now:
            raise ValueError(
                f"{name}: the KD phase of this run began with {', '.join(paths) or 'none'}, of "
                f"fingerprint {', '.join(before) or '-'}; what is given now has "
                f"{', '.join(now) or 'none'}: give the same files (they may have been made anew "
                "since then), or start a new run"
            )


def _check_deepspeed(before: Mapping[str, Any], settings: DeepSpeedSettings) -> None:
    """Raise ValueError for another optimizer, which would have no use for the state of this one."""

    def kind(values: Mapping[str, Any]) -> tuple[str, Any]:
        optimizer = values.get("optimizer", {})
        return str(optimizer.get("type")).lower(), optimizer.get("params", {}).get("amsgrad", False)

    was, now = kind(before), kind(settings.values)
    if was != now:
        raise ValueError(
            f"{settings.path}: optimizer (type, amsgrad) = {now}, the checkpoint was trained with "
            f"{was}: keep it, or start a new run from its weights (train.init_from)"
        )


def changed_deepspeed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` for every top-level key of the DeepSpeed JSON that differs."""
    keys = sorted({*before, *now})
    return [f"{k}: {before.get(k)} -> {now.get(k)}" for k in keys if before.get(k) != now.get(k)]
