"""What must hold before a run starts or goes on: no run is overwritten, a resume is exact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_salt.checkpoint import CheckpointManifest, list_checkpoints, step_name
from megatron_salt.config import RunConfig, effective_split, parse_blend
from megatron_salt.deepspeed_config import DeepSpeedSettings, read_json
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
    splits = [effective_split(c.data) for c in (resumed.config, config)]
    if splits[0] != splits[1]:
        raise ValueError(
            f"data.split and data.valid_data_path: the training documents would be those of split "
            f"{splits[1]!r}, the checkpoint's are of {splits[0]!r}: the order of the data would "
            "change"
        )
    if resumed.config.data.eod_mask_loss != config.data.eod_mask_loss:
        raise ValueError(
            f"data.eod_mask_loss = {config.data.eod_mask_loss}, the checkpoint's is "
            f"{resumed.config.data.eod_mask_loss}: other tokens would count"
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
    assert resume_from is not None
    _check_deepspeed(read_json(str(resume_from / "deepspeed.json")), settings)
    if resumed.config.train.seed != config.train.seed:
        raise ValueError(
            f"train.seed = {config.train.seed}, the checkpoint's is {resumed.config.train.seed}: "
            "the order of the data would change"
        )


def _check_deepspeed(before: Mapping[str, Any], settings: DeepSpeedSettings) -> None:
    """Raise ValueError for a change in the DeepSpeed JSON that loading the checkpoint would undo.

    The optimiser's state brings its own betas, eps, weight decay and clipping limit; a new number
    in the file would be shown and not used. The learning rate is set anew at every step.
    """

    def restored(values: Mapping[str, Any]) -> dict[str, Any]:
        optimizer = values.get("optimizer", {})
        return {
            "optimizer.type": optimizer.get("type"),
            "optimizer.params": {k: v for k, v in optimizer.get("params", {}).items() if k != "lr"},
            "gradient_clipping": values.get("gradient_clipping", 1.0),
            "data_types": values.get("data_types", {}),
        }

    now = restored(settings.values)
    for key, value in restored(before).items():
        if now[key] != value:
            raise ValueError(
                f"{settings.path}: {key} = {now[key]}, the checkpoint was trained with {value}, "
                "which DeepSpeed restores with the optimizer: keep it, or start a new run"
            )


def changed_deepspeed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` for every top-level key of the DeepSpeed JSON that differs."""
    keys = sorted({*before, *now})
    return [f"{k}: {before.get(k)} -> {now.get(k)}" for k in keys if before.get(k) != now.get(k)]
