"""From settings to the parts of a run: what it starts from, its data, its student, its log."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch.distributed as dist

from megatron_salt.checkpoint.folder import set_aside_damaged
from megatron_salt.checkpoint.manifest import (
    CheckpointManifest,
    verify_hashes,
    weights_fingerprint,
)
from megatron_salt.config.command_line import write_config
from megatron_salt.config.deepspeed import (
    DeepSpeedSettings,
    check_against_run,
    load_deepspeed_config,
    read_json,
)
from megatron_salt.config.fields import RunConfig
from megatron_salt.data import dataset, tag_inputs
from megatron_salt.data.logits import StoredLogits
from megatron_salt.data.objective import check_sentinels
from megatron_salt.data.tokenizer import Tokenizer
from megatron_salt.files.disk import atomic_path
from megatron_salt.method.switch import SwitchState, carried_over
from megatron_salt.model.attention import device_attention_backends
from megatron_salt.model.loss import loss_backend
from megatron_salt.model.weights import DTYPES
from megatron_salt.parallel.groups import (
    Groups,
    from_rank_0,
    initialize,
    make_deterministic,
    same_error_everywhere,
)
from megatron_salt.parallel.machine import adam_to_compile, check_fused_adam, fused_adam_facts
from megatron_salt.training import resume
from megatron_salt.training.console import Console
from megatron_salt.training.engine import StudentEngine
from megatron_salt.training.initial import Initial, check_export, find_initial
from megatron_salt.training.metrics import MetricsLog
from megatron_salt.training.state import restore
from megatron_salt.training.student_logits import check_not_there


class NothingToDo(Exception):
    """The run that was asked for is done; no file has been changed."""


@dataclass(frozen=True)
class Start:
    """What all ranks have agreed to start from."""

    tokenizer: Tokenizer
    tag_inputs: tag_inputs.TagInputs
    resume_from: Path | None
    resumed: CheckpointManifest | None
    """What the checkpoint says about itself; None: a new run."""
    initial: Initial | None
    """Whose weights a new run starts from; None: random ones, or those of `resumed`."""
    switch: SwitchState
    lock: IO[str] | None
    """On rank 0: open as long as the run holds its output_dir."""

    @property
    def step(self) -> int:
        return self.resumed.run.step if self.resumed else 0

    @property
    def init_fingerprint(self) -> str | None:
        """Identity of the weights that the run started from, however often it was resumed."""
        if self.resumed:
            return self.resumed.run.init_fingerprint
        return weights_fingerprint(self.initial.manifest) if self.initial else None


def join_ranks(config: RunConfig, deepspeed_config: str) -> tuple[DeepSpeedSettings, Groups]:
    """Process groups of this rank, and the DeepSpeed JSON checked against the run.

    Raises: ValueError or FileNotFoundError on all ranks, naming file and key.
    """
    parallel = config.parallel
    if config.train.deterministic:
        make_deterministic()
    groups = initialize(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.timeout_minutes,
    )
    with same_error_everywhere("reading the DeepSpeed config"):
        settings = load_deepspeed_config(deepspeed_config, groups.layout.dp_size)
        check_against_run(settings, config)
        if groups.device.type == "cuda":
            check_fused_adam(settings.values, settings.path, fused_adam_facts())
    return settings, groups


def agree_on_start(
    config: RunConfig, settings: DeepSpeedSettings, groups: Groups, console: Console
) -> Start:
    """Check data and checkpoint, claim output_dir, and verify what the run resumes from.

    Raises: ValueError or FileNotFoundError on all ranks, naming the file or setting; NothingToDo.
    """
    lock: IO[str] | None = None
    with same_error_everywhere("checking data and output_dir"):
        tokenizer = dataset.find_tokenizer(config.data)
        inputs = initial = None
        if groups.rank == 0:
            dataset.verify_datasets(config.data, tokenizer)
            check_sentinels(config.data, tokenizer)
            inputs = tag_inputs.load_tag_inputs(config, tokenizer)
            lock = resume.lock_output_dir(config.train.output_dir, console.say)
    resume_from, resumed, warnings = _find_intact(config, settings, groups, tokenizer.fingerprint)
    done = resumed is not None and resumed.run.step >= config.train.steps
    with same_error_everywhere("checking what the run starts from"):
        if inputs is not None:
            if config.teacher.logits and not resume.kd_phase_is_over(config, resumed):
                inputs = tag_inputs.with_logits(inputs, config, tokenizer)
            if resumed is None:
                initial = find_initial(config, tokenizer)
            elif not done:
                resume.check_same_tag_inputs(config, resumed, inputs)
            if not done:
                check_export(config, tokenizer)
                check_not_there(config)
    inputs, initial = from_rank_0((inputs, initial))
    console.warn([*warnings, *tag_inputs.logits_warnings(config, inputs.logits)])
    if resumed and done:
        raise NothingToDo(
            f"nothing to do: {resume_from} has done {resumed.run.step} of {config.train.steps} "
            "steps; a larger train.steps goes on"
        )
    switch = SwitchState()
    if resumed:
        switch = carried_over(resumed.run.switch, resumed.run.config.salt, config.salt)
    return Start(tokenizer, inputs, resume_from, resumed, initial, switch, lock)


def _find_intact(
    config: RunConfig, settings: DeepSpeedSettings, groups: Groups, tokenizer_fingerprint: str
) -> tuple[Path | None, CheckpointManifest | None, list[str]]:
    """The checkpoint to resume from, every byte of which is as it was written; with warnings about
    damaged ones, which are set aside.

    One rank looks and decides: shared file systems show different ranks different folders. Each
    reads a share of the files.
    Raises: ValueError on all ranks if the one that was named, or every one, is damaged.
    """
    damaged: dict[str, str] = {}
    while True:
        found = None
        with same_error_everywhere("looking for a checkpoint"):
            if groups.rank == 0:
                found = resume.decide_start(config, settings, tokenizer_fingerprint, damaged)
        resume_from, resumed, warnings = from_rank_0(found)
        if resumed is None or resumed.run.step >= config.train.steps:
            break
        problems: list[str | None] = [None] * groups.layout.world_size
        problem = None
        try:
            share = sorted(resumed.files)[groups.rank :: groups.layout.world_size]
            verify_hashes(resume_from, resumed, share)
        except (OSError, ValueError) as error:
            problem = str(error)
        dist.all_gather_object(problems, problem)
        if not any(problems):
            break
        damaged[resume_from.name] = next(each for each in problems if each)
    with same_error_everywhere("setting damaged checkpoints aside"):
        if groups.rank == 0 and warnings and resume_from:
            set_aside_damaged(config.train.output_dir, resume_from)
    return resume_from, resumed, warnings


def build_data(
    config: RunConfig, settings: DeepSpeedSettings, start: Start, console: Console,
    *, teaches: bool,
) -> dataset.DataSource:  # fmt: skip
    """The rows of every step and of the evaluations.

    Args:
        teaches: whether this rank needs what stored logits say of the rows.
    Raises: ValueError if a resumed run would read other data than it began with.
    """
    # In the LM phase none have been looked for.
    stored = zip(config.teacher.logits, start.tag_inputs.logits, strict=False)
    top_k = config.salt.truncate_k
    data = dataset.DataSource(
        config.data, start.tokenizer, seed=config.train.seed,
        num_samples=config.train.steps * settings.global_batch_size,
        num_selected=config.salt.kd_steps * settings.global_batch_size,
        cache_path=Path(config.data.cache_path or f"{config.train.output_dir}/index_cache"),
        tag_inputs=start.tag_inputs, with_reference_loss=tag_inputs.reads_reference_loss(config),
        logits=[StoredLogits(path, each, top_k=top_k) for path, each in stored if teaches],
    )  # fmt: skip
    for line in [*data.epochs_needed(), *start.tag_inputs.describe()]:
        console.say(f"data: {line}")
    if config.data.tags and not tag_inputs.reads_tags(config):
        console.warn(
            ["data.tags has no effect: neither salt.kd_tokens nor salt.ce_tokens reads the tags"]
        )
    if start.resumed and start.resumed.run.data != data.fingerprints():
        raise ValueError(
            f"{start.resume_from}: was trained on other data than data.train_data_path now names; "
            "a resumed run must read the same files (or start anew in another output_dir)"
        )
    return data


def prepare_loss(
    config: RunConfig, settings: DeepSpeedSettings, groups: Groups, console: Console
) -> None:
    """Build the loss's code before the first step, and see that all ranks run the same.

    Raises: ValueError or RuntimeError on all ranks.
    """
    with same_error_everywhere("preparing the loss"):
        name = loss_backend(config.salt, DTYPES[settings.precision], groups.device).name
    first = from_rank_0(name)
    with same_error_everywhere("preparing the loss"):
        if name != first:
            raise ValueError(
                f"rank {groups.rank} on {platform.node()} would compute the loss by its {name} "
                f"code, rank 0 by {first}: `megatron-salt kernels` there says why; mend "
                "that, or set salt.loss_impl"
            )
    console.say(f"loss: {name} code, logits in {config.salt.logits_dtype}")
    backends = device_attention_backends()
    if backends is not None:
        order = ", ".join(each.name.removesuffix("_ATTENTION") for each in backends)
        console.say(f"attention: the first of {order} that serves the tensors at hand")


def announce_build(settings: DeepSpeedSettings) -> str:
    """A line for people before the student is built, which may take long without a word."""
    line = "building student and optimizer; the first step follows"
    operator = adam_to_compile(settings.values)
    if operator:
        line += f", after DeepSpeed's {operator} is compiled, once on this machine (a minute or so)"
    return line


def resume_student(
    student: StudentEngine, config: RunConfig, start: Start, console: Console
) -> None:
    """Load weights and optimizer of the checkpoint, if there is one; say what has changed since."""
    if start.resumed is None or start.resume_from is None:
        return
    restore(student, start.resume_from, start.resumed)
    console.say(f"resumed from {start.resume_from} at step {start.step}")
    model, run, layout = start.resumed.model, start.resumed.run, student.groups.layout
    was = model.tp_size, model.pp_size, run.dp_size, run.zero_stage
    now = layout.tp_size, layout.pp_size, layout.dp_size, student.settings.zero_stage
    if was != now:
        console.say(f"  (tp, pp, dp, ZeRO stage) {was} -> {now}: sums are rounded in another order")
    before = read_json(str(start.resume_from / "deepspeed.json"))
    changes = resume.changed_settings(start.resumed.run.config, config)
    for change in [*changes, *resume.changed_deepspeed(before, student.settings.values)]:
        console.say(f"  changed since then: {change}")


def open_log(config: RunConfig, student: StudentEngine, first_step: int) -> MetricsLog | None:
    """On rank 0: write the resolved configs, and go on with the metrics of the steps done."""
    if student.groups.rank != 0:
        return None
    output_dir = Path(config.train.output_dir)
    write_config(config, output_dir / "config.json")
    text = json.dumps(dict(student.settings.values), indent=2) + "\n"
    with atomic_path(output_dir / "deepspeed.json") as temporary:
        temporary.write_text(text, encoding="utf-8")
    plain = (str, int, float, bool)
    shown = {
        f"{section}.{key}": value if isinstance(value, plain) else json.dumps(value)
        for section, values in config.to_dict().items()
        for key, value in values.items()
    }
    shown["optimizer.params.lr"] = student.settings.learning_rate
    shown["train_batch_size"] = student.settings.global_batch_size
    return MetricsLog(
        output_dir, resumed_step=first_step, tensorboard=config.train.tensorboard, settings=shown
    )
