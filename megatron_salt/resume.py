"""What must hold before a run starts or goes on: no run is overwritten, a resume is exact."""

from __future__ import annotations

from pathlib import Path

from megatron_salt.checkpoint import CheckpointManifest, list_checkpoints, step_name
from megatron_salt.config import RunConfig, parse_blend
from megatron_salt.deepspeed_config import DeepSpeedSettings
from megatron_salt.parallel.layout import Layout


def changed_settings(before: RunConfig, now: RunConfig) -> list[str]:
    """`section.field: old -> new` for every setting that differs; what a resume should tell."""
    old, new = before.to_dict(), now.to_dict()
    return [
        f"{section}.{field}: {old[section][field]} -> {value}"
        for section, values in new.items()
        for field, value in values.items()
        if old[section][field] != value
    ]


def check_start(
    config: RunConfig,
    layout: Layout,
    settings: DeepSpeedSettings,
    tokenizer_fingerprint: str,
    resume_from: Path | None,
    resumed: CheckpointManifest | None,
) -> None:
    """Raise ValueError where starting would overwrite a run or a resume would not continue exactly.

    Layout, ZeRO stage, precision, tokenizer, model, batch size, seed and what decides the order of
    the data must be the checkpoint's. Method and learning rate may change, and it is said
    (`changed_settings`).
    """
    output_dir = Path(config.train.output_dir)
    existing = list_checkpoints(output_dir)
    if resumed is None:
        if existing:
            raise ValueError(
                f"train.output_dir = {output_dir} already has checkpoints and train.resume = "
                f"{config.train.resume}: choose another output_dir, or train.resume auto"
            )
        return
    if existing and existing[-1].name > step_name(resumed.step) and config.train.resume != "auto":
        raise ValueError(
            f"train.resume = {resume_from} is at step {resumed.step}, but train.output_dir = "
            f"{output_dir} has later checkpoints up to {existing[-1].name}, which a later resume "
            "would take for this run's: choose another output_dir, or move them away"
        )
    saved = (resumed.tp_size, resumed.pp_size, resumed.dp_size, resumed.zero_stage)
    now = (layout.tp_size, layout.pp_size, layout.dp_size, settings.zero_stage)
    if saved != now:
        raise ValueError(
            f"the checkpoint was saved with (tp, pp, dp, ZeRO stage) = {saved}, this run has "
            f"{now}: resume with the same layout"
        )
    if resumed.tokenizer_fingerprint != tokenizer_fingerprint:
        raise ValueError("the checkpoint was trained with another tokenizer than data.tokenizer")
    lengths = (resumed.config.data.seq_length, config.data.seq_length)
    if resumed.config.model != config.model or lengths[0] != lengths[1]:
        changes = changed_settings(resumed.config, config)
        wrong = [c for c in changes if c.startswith("model.") or c.startswith("data.seq_length")]
        raise ValueError(f"the checkpoint's model is not this run's: {'; '.join(wrong)}")
    rows = resumed.step * settings.global_batch_size
    if resumed.data_rows != rows:
        raise ValueError(
            f"the checkpoint has read {resumed.data_rows} sequences in {resumed.step} steps; with "
            f"train_batch_size = {settings.global_batch_size} this run would go on at sequence "
            f"{rows}: keep the batch size"
        )
    for name in ("split", "eod_mask_loss"):
        before, after = (getattr(c.data, name) for c in (resumed.config, config))
        if before != after:
            raise ValueError(
                f"data.{name} = {after!r}, the checkpoint's is {before!r}: the data would change"
            )
    weights = [
        parse_blend(c.data.train_data_path, "data.train_data_path")[1]
        for c in (resumed.config, config)
    ]
    if weights[0] != weights[1]:
        raise ValueError(
            f"data.train_data_path: blend weights {weights[1]}, the checkpoint's are {weights[0]}: "
            "the order of the data would change"
        )
    if resumed.precision != settings.precision:
        raise ValueError(
            f"{settings.path}: precision {settings.precision}, the checkpoint was trained in "
            f"{resumed.precision}"
        )
    if resumed.config.train.seed != config.train.seed:
        raise ValueError(
            f"train.seed = {config.train.seed}, the checkpoint's is {resumed.config.train.seed}: "
            "the order of the data would change"
        )
