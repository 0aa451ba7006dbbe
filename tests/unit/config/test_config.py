"""Settings: how they are read, that a slip is named, that contradictions are refused."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_salt.config.command_line import CommandLine, parse_command_line, write_config
from megatron_salt.config.deepspeed import (
    REFUSED_KEYS,
    DeepSpeedSettings,
    check_against_run,
    engine_config,
    load_deepspeed_config,
    read_json,
    resolve_batch_sizes,
)
from megatron_salt.config.fields import KEYS, SECTIONS, RunConfig
from megatron_salt.config.problems import check_config

RUN = """
model: {num_layers: 4, hidden_size: 64, num_attention_heads: 8, num_query_groups: 4}
data: {train_data_path: [0.7, a_text_document, 0.3, b_text_document], seq_length: 32}
train: {steps: 100, output_dir: runs/one, lr_schedule: wsd}
"""
DEEPSPEED: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 3,
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-4}},
}
Parse = Callable[..., CommandLine]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """The options that every command line here begins with."""
    return write_files(tmp_path)


def write_files(folder: Path) -> list[str]:
    (folder / "run.yaml").write_text(RUN)
    (folder / "ds.json").write_text(json.dumps(DEEPSPEED))
    return ["--config", str(folder / "run.yaml"), "--deepspeed_config", str(folder / "ds.json")]


@pytest.fixture
def refused(files: list[str], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line that a command line ends with."""

    def run(*options: str, base: bool = True) -> str:
        with pytest.raises(SystemExit) as stopped:
            parse_command_line([*(files if base else []), *options])
        assert stopped.value.code == 2
        printed = capsys.readouterr()
        assert printed.out == "" and "Traceback" not in printed.err
        return printed.err

    return run


def test_command_line_overrides_yaml_overrides_defaults(files: list[str]) -> None:
    command = parse_command_line([*files, "--train.steps", "7", "--salt.kd_weight=0.25"])
    config = command.config
    assert (config.train.steps, config.salt.kd_weight) == (7, 0.25)  # command line
    assert (config.train.lr_schedule, config.data.seq_length) == ("wsd", 32)  # YAML
    assert config.data.train_data_path == ["0.7", "a_text_document", "0.3", "b_text_document"]
    assert (config.train.seed, config.model.normalization) == (1234, "RMSNorm")  # defaults
    assert command.deepspeed_config == files[3] and not command.dry_run


def test_objectives_are_read_like_data_prefixes(files: list[str]) -> None:
    assert parse_command_line(files).config.data.objective == ["causal"]
    for given, read in (("[0.6,causal,0.4,prefix]", ["0.6", "causal", "0.4", "prefix"]),
                        ("[prefix]", ["prefix"])):  # fmt: skip
        config = parse_command_line([*files, "--data.objective", given]).config
        assert config.data.objective == read


def test_later_yaml_overrides_earlier_key_by_key(files: list[str], tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("train: {steps: 50}\nsalt: {}\n")
    config = parse_command_line([*files, "--config", str(tmp_path / "more.yaml")]).config
    assert (config.train.steps, config.train.output_dir) == (50, "runs/one")


def test_derived_sizes(files: list[str]) -> None:
    model = parse_command_line(files).config.model
    assert (model.ffn_size, model.head_size, model.query_groups) == (256, 8, 4)
    options = ["--model.ffn_hidden_size=96", "--model.kv_channels=16"]
    model = parse_command_line([*files, *options, "--model.num_query_groups=null"]).config.model
    assert (model.ffn_size, model.head_size, model.query_groups) == (96, 16, 8)


def test_config_survives_its_own_dictionary_and_file(files: list[str], tmp_path: Path) -> None:
    config = parse_command_line([*files, "--train.lr_decay_steps", "9"]).config
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict())), source="x") == config
    write_config(config, tmp_path / "config.json")
    again = parse_command_line(["--config", str(tmp_path / "config.json"), *files[2:]])
    assert again.config == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["train"].update(stepz=1), r"^here: unknown fields \['stepz'\] in train"),
        (lambda d: d.update(extra={}), r"^here: unknown fields \['extra'\]"),
        (lambda d: d["train"].pop("steps"), r"^here: missing fields \['steps'\] in train"),
    ],
)
def test_dictionary_of_another_version_is_refused(
    change: Callable[[dict[str, Any]], Any], message: str, files: list[str]
) -> None:
    values = parse_command_line(files).config.to_dict()
    change(values)
    with pytest.raises(ValueError, match=message):
        RunConfig.from_dict(values, source="here")


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("train: {stepps: 3}", ["unknown key 'train.stepps'", "'train.steps'"]),
        ("salt: {kd_step: 3}", ["unknown key 'salt.kd_step'", "'salt.kd_steps'"]),
        # The right name in the wrong section.
        ("train: {seq_length: 3}", ["unknown key 'train.seq_length'", "'data.seq_length'"]),
        ("traim: {steps: 3}", ["unknown section 'traim'", "'train'"]),
        ("train: hello", ["section 'train' holds 'hello'"]),
        ("train: 3", ["section 'train' holds 3"]),
        ("salt:", ["section 'salt' holds None"]),
        ("[1, 2]", ["expected sections"]),
        ("", ["expected sections"]),
        ("train: {steps: 3", ["not valid YAML", "slip.yaml:1:17"]),
        ("train: {steps: many}", ["train.steps", "many"]),
        ("model: {activation: relu}", ["model.activation", "relu", "swiglu"]),
    ],
)
def test_slip_in_a_yaml_file_is_named(
    yaml: str, words: list[str], refused: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / "slip.yaml"
    path.write_text(yaml)
    for option in (["--config", str(path)], [f"--config={path}"]):
        line = refused(*option)
        assert all(word in line for word in words), line
        if "many" not in yaml and "relu" not in yaml:
            assert str(path) in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--train.stepps", "3"], ["--train.stepps", "'train.steps'"]),
        (["--train.stepps=3"], ["--train.stepps", "'train.steps'"]),
        (["--traim.steps", "3"], ["--traim.steps", "'train.steps'"]),
        (["--deepspeed_confg", "x"], ["--deepspeed_confg", "'deepspeed_config'"]),
        (["--dryrun"], ["--dryrun", "'dry_run'"]),
        (["--conf", "x.yaml"], ["--conf", "'config'"]),  # no abbreviations: they hide slips
        (["stray"], ["stray"]),
        (["--train.steps", "many"], ["train.steps", "many"]),
        (["--config", "absent.yaml"], ["absent.yaml", "No such file"]),
    ],
)
def test_slip_on_the_command_line_is_named(
    options: list[str], words: list[str], refused: Callable[..., str]
) -> None:
    line = refused(*options)
    assert all(word in line for word in words), line
    assert line.count("\n") <= 2, "one message, not a screen of usage"


def test_missing_settings_are_named(refused: Callable[..., str], files: list[str]) -> None:
    assert "train.steps" in refused(*files[2:], base=False)
    assert "--deepspeed_config is missing" in refused(*files[:2], base=False)


def test_only_the_first_rank_speaks(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert refused("--train.stepps", "3") == ""


# Changes to a config that is good, and what the refusal says. Dotted names are its settings.
ADAPTIVE = {"salt.switch": "adaptive", "train.eval_interval": 10}
LOGITS = {"teacher.logits": ["a", "b"], "teacher.checkpoint": None}
HF = {"teacher.hf": "folder", "teacher.checkpoint": None}

CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"train.steps": 0}, "train.steps = 0"),
    ({"data.seq_length": 0}, "data.seq_length = 0"),
    ({"data.train_data_path": []}, "data.train_data_path is empty"),
    ({"data.objective": []}, r"data.objective = \[\]: expected WEIGHT NAME"),
    ({"data.objective": ["casual"]}, "'casual' is no objective.*Did you mean 'causal'"),
    ({"data.objective": ["0.6", "causal", "0.4", "prefx"]}, "'prefx' is no.*mean 'prefix'"),
    ({"data.objective": ["causal", "prefix"]}, "several objectives need a weight before each"),
    ({"data.objective": ["1", "causal", "2"]}, "expected WEIGHT NAME pairs"),
    ({"data.objective": ["1", "causal", "0", "prefix"]}, "weights above 0"),
    ({"data.objective": ["1", "causal", "nan", "prefix"]}, "weights above 0"),
    ({"data.objective": ["1", "causal", "1", "causal"]}, "an objective is named twice"),
    ({"data.span_corruption_rate": 0.0}, "data.span_corruption_rate = 0.0"),
    ({"data.span_corruption_rate": 1.0}, "data.span_corruption_rate = 1.0"),
    ({"data.span_mean_length": 0.9}, "data.span_mean_length = 0.9"),
    ({"data.objective": ["span_corruption"], "data.seq_length": 3}, "seq_length = 3 has no room"),
    ({"data.tags": ["a"]}, "data.tags names 1, data.train_data_path 2 datasets"),
    ({"salt.selection": ["a"]}, "salt.selection names 1, data.train_data_path 2 datasets"),
    ({"data.tags": ["a", "b"], "data.objective": ["1", "causal", "1", "span_corruption"]},
     "data.tags: span_corruption .* another token's"),
    ({"salt.kd_tokens": "tagged"}, "salt.kd_tokens = tagged needs data.tags"),
    ({"salt.ce_tokens": "untagged"}, "salt.ce_tokens = untagged needs data.tags"),
    ({"salt.kd_tokens": "low_entropy"}, "salt.kd_token_share is 1: low_entropy would take every"),
    ({"salt.ce_tokens": "excess_loss"}, "salt.ce_token_share is 1: excess_loss would take every"),
    ({"salt.kd_token_share": 0.5}, "salt.kd_token_share = 0.5 has no effect"),
    ({"salt.ce_token_share": 0.5}, "salt.ce_token_share = 0.5 has no effect"),
    ({"salt.kd_token_share": 0.0}, "salt.kd_token_share = 0.0: must be above 0"),
    ({"salt.kd_weight": 0.0, "salt.kd_tokens": "teacher_better"}, "no effect at salt.kd_weight 0"),
    ({"salt.kd_steps": 0, "teacher.checkpoint": None, "data.tags": ["a", "b"]},
     "data.tags has no effect without a KD phase"),
    ({"salt.kd_steps": 0, "teacher.checkpoint": None, "salt.selection": ["a", "b"]},
     "salt.selection has no effect without a KD phase"),
    ({"salt.kd_weight": 0.0, "teacher.checkpoint": None, "salt.ce_tokens": "excess_loss",
      "salt.ce_token_share": 0.5}, "excess_loss compares with a reference loss"),
    ({"salt.kd_steps": 101}, "salt.kd_steps = 101.*train.steps = 100"),
    ({"salt.kd_steps": -1}, "salt.kd_steps = -1"),
    ({"salt.kd_weight": 1.1}, "salt.kd_weight = 1.1"),
    ({"salt.kd_weight": -0.1}, "salt.kd_weight = -0.1"),
    ({"salt.kd_weight": float("nan")}, "salt.kd_weight = nan"),
    ({"teacher.tensor_parallel": True}, "tensor_parallel has no effect with parallel.*= 1: "),
    ({"teacher.tensor_parallel": True, "salt.kd_steps": 0, "teacher.checkpoint": None,
      "parallel.tensor_model_parallel_size": 2},
     "teacher.tensor_parallel has no effect without teacher.checkpoint"),
    ({"teacher.hf": "folder", "teacher.checkpoint": None, "data.objective": ["prefix"]},
     "a teacher.hf reads causal rows only; give the model as teacher.checkpoint"),
    ({"salt.teacher_temperature": 0.0}, "salt.teacher_temperature = 0.0"),
    ({"salt.student_temperature": -2.0}, "salt.student_temperature = -2.0"),
    ({"salt.loss_chunk_mib": 0}, "salt.loss_chunk_mib = 0"),
    ({"salt.divergence": "mse", "salt.loss_impl": "native"}, "salt.divergence = mse is comp"),
    ({"salt.transition": "linear_decay"}, "linear_decay needs salt.transition_steps > 0"),
    ({"salt.transition": "linear_ratio_decay"}, "linear_ratio_decay needs salt.transition_steps"),
    ({"salt.transition_steps": 41}, r"\(41 together\) exceed.*salt.kd_steps = 40"),
    ({"salt.transition": "wsd", "salt.transition_steps": 30, "salt.warmup_steps": 11},
     r"\(41 together\) exceed"),
    ({"salt.transition_steps": -1}, "salt.transition_steps = -1"),
    ({"salt.warmup_steps": -1}, "salt.warmup_steps = -1"),
    ({"salt.inheritance_slope": -0.5}, "salt.inheritance_slope = -0.5"),
    ({"salt.transition": "linear_ratio_decay", "salt.transition_steps": 4, "salt.kd_weight": 1.0},
     "infinite at kd_weight 1"),
    ({"teacher.checkpoint": None}, "salt.kd_steps = 40 but teacher.checkpoint is not set"),
    ({"teacher.hf": "folder"}, "teacher.checkpoint = slm and teacher.hf = folder: .* leave one"),
    ({"teacher.hf": "folder", "teacher.checkpoint": None, "teacher.forward_chunks": 2,
      "parallel.pipeline_model_parallel_size": 2}, "forward_chunks = 2 has no effect with t.*hf"),
    ({"teacher.hf": "folder", "teacher.checkpoint": None, "salt.kd_steps": 0},
     "teacher.hf = folder would never teach"),
    ({"salt.kd_steps": 0}, "teacher.checkpoint = slm would never teach, salt.kd_steps is 0"),
    ({"teacher.logits": ["a", "b"]}, "teacher.checkpoint = slm and teacher.logits = .* leave one"),
    ({**LOGITS, "teacher.logits": ["a"]}, "teacher.logits names 1, data.train_data_path 2"),
    ({**LOGITS, "data.objective": ["prefix"]}, "teacher.logits are of causal rows only"),
    ({**LOGITS, "teacher.placement": "before_step"}, "before_step has no effect with teacher.l"),
    ({**LOGITS, "salt.kd_steps": 0}, "teacher.logits = .* would never teach"),
    ({**LOGITS, "salt.divergence": "mse"}, "divergence = mse asks for .* every token"),
    ({"salt.truncate_k": 50, "salt.divergence": "reverse_kl"}, "reverse_kl asks .* every token"),
    ({"salt.truncate_k": 50, "teacher.checkpoint": None, "salt.kd_steps": 0},
     "truncate_k = 50 has no effect without a teacher"),
    ({"salt.truncate_k": 0}, "truncate_k = 0: must be at least 1"),
    ({**LOGITS, "salt.truncate_p": 1.5}, "truncate_p = 1.5: must be above 0, at most 1"),
    ({"salt.truncate_p": 0.9}, "truncate_p = 0.9 needs salt.truncate_k"),
    ({"salt.lost_mass": "raw"}, "lost_mass = raw has no effect: nothing is cut off"),
    ({**LOGITS, "salt.lost_mass": "ghost", "salt.teacher_temperature": 2.0},
     "lost_mass = ghost with salt.teacher_temperature = 2.0"),
    ({**LOGITS, "salt.lost_mass": "ghost", "salt.divergence": "mse_probabilities"},
     "ghost has no bucket"),
    ({"salt.min_kd_steps": 3}, "salt.min_kd_steps = 3 has no effect with salt.switch = fixed"),
    ({"salt.switch_margin_nats": 0.1}, "salt.switch_margin_nats = 0.1 has no effect .* adaptive"),
    ({"salt.switch_better_share": 0.1}, "salt.switch_better_share = 0.1 has no effect"),
    ({"salt.switch_patience": 3}, "salt.switch_patience = 3 has no effect with salt.switch = fix"),
    ({**ADAPTIVE, "teacher.checkpoint": None, "salt.kd_steps": 0}, "no teacher .* or choose fixed"),
    ({**ADAPTIVE, "salt.kd_weight": 0.0, "teacher.checkpoint": None}, "there is no teacher that"),
    ({**ADAPTIVE, "salt.kd_weight": 0.0}, "salt.kd_weight above 0, or choose fixed"),
    ({**ADAPTIVE, "salt.transition": "constant"}, "constant means a teacher .* choose step"),
    ({**ADAPTIVE, "salt.transition": "knowledge_inheritance"}, "would jump .* linear_decay"),
    ({**ADAPTIVE, "train.eval_interval": 0}, "decides at evaluations, and train.eval_interval is"),
    ({**ADAPTIVE, "salt.switch_patience": 0}, "salt.switch_patience = 0: must be at least 1"),
    ({**ADAPTIVE, "salt.switch_margin_nats": float("inf")}, "salt.switch_margin_nats = inf"),
    ({**ADAPTIVE, "salt.switch_better_share": 1.0}, "salt.switch_better_share = 1.0: .* below 1"),
    ({**ADAPTIVE, "salt.switch_better_share": -0.1}, "salt.switch_better_share = -0.1"),
    ({**ADAPTIVE, "salt.min_kd_steps": -1}, "salt.min_kd_steps = -1: must not be negative"),
    ({**ADAPTIVE, "salt.min_kd_steps": 40}, "before step 40 .* salt.kd_steps = 40 anyway"),
    ({**ADAPTIVE, "train.eval_interval": 20}, "before step 40 .* lower one of these"),
    ({**ADAPTIVE, "salt.transition": "linear_decay", "salt.transition_steps": 20},
     "before step 40"),
    ({**ADAPTIVE, "salt.transition": "wsd", "salt.transition_steps": 15, "salt.warmup_steps": 25},
     "before step 40"),
    ({"train.lr_warmup_steps": 101}, "train.lr_warmup_steps = 101 exceeds train.steps = 100"),
    ({"train.lr_warmup_steps": -1}, "train.lr_warmup_steps = -1"),
    ({"train.lr_decay_steps": 0}, "train.lr_decay_steps = 0"),
    ({"train.min_lr_ratio": 1.5}, "train.min_lr_ratio = 1.5"),
    ({"train.min_lr_ratio": -0.1}, "train.min_lr_ratio = -0.1"),
    ({"train.seed": -1}, "train.seed = -1"),
    ({"train.eval_interval": -1}, "train.eval_interval = -1"),
    ({"train.checkpoint_interval": -1}, "train.checkpoint_interval = -1"),
    ({"train.keep_checkpoints": -1}, "train.keep_checkpoints = -1"),
    ({"train.log_interval": 0}, "train.log_interval = 0: must be at least 1"),
    ({"train.eval_samples": 0}, "train.eval_samples"),
    ({"model.num_layers": 0}, "num_layers = 0"),
    ({"model.num_attention_heads": 3}, "num_attention_heads"),
    ({"model.num_query_groups": 3}, "num_attention_heads = 8 .* num_query_groups = 3"),
    ({"model.max_position_embeddings": 16, "model.position_embedding_type": "learned_absolute"},
     "max_position_embeddings = 16 is below data.seq_length = 32"),
    ({"model.kv_channels": 7}, "pairs of channels, not 7"),
    ({"model.rotary_percent": 0.0}, "rotary_percent = 0.0"),
    ({"model.rotary_percent": 0.1}, "pairs of channels, not 0 .rotary_percent = 0.1 of"),
    ({"model.rope_scaling": {"factor": 8, "low_freq_factor": 1}}, "give factor alone, or factor, "),
    ({"model.rope_scaling": {"factor": 0}}, "rope_scaling = .*must be numbers above 0"),
    ({"model.rope_scaling": {"factor": 8, "low_freq_factor": 4, "high_freq_factor": 4,
      "original_max_position_embeddings": 64}}, "high_freq_factor must be above"),
    ({"model.rotary_percent": 0.5, "model.position_embedding_type": "learned_absolute"},
     "rotary_percent has no effect without rope"),
    ({"model.rope_scaling": {"factor": 2}, "model.position_embedding_type": "learned_absolute"},
     "rope_scaling has no effect without rope"),
    ({"model.add_qkv_bias": True, "model.add_bias_linear": True}, "add_qkv_bias has no effect"),
    ({"parallel.tensor_model_parallel_size": 0}, "tensor_model_parallel_size = 0, "),
    ({"parallel.tensor_model_parallel_size": 8}, "num_query_groups = 4 is not divisible.*= 8"),
    ({"parallel.tensor_model_parallel_size": 4, "model.ffn_hidden_size": 90}, "_hidden_size = 90"),
    ({"parallel.pipeline_model_parallel_size": 5}, "= 5 exceeds model.num_layers = 4"),
    ({"parallel.sequence_parallel": True}, "needs parallel.tensor_model_parallel_size > 1"),
    ({"parallel.sequence_parallel": True, "parallel.tensor_model_parallel_size": 4,
      "data.seq_length": 30}, "data.seq_length = 30 is not divisible by tp 4"),
]  # fmt: skip


def changed(config: RunConfig, settings: dict[str, Any]) -> RunConfig:
    for name, value in settings.items():
        section, key = name.split(".")
        part = dataclasses.replace(getattr(config, section), **{key: value})
        config = dataclasses.replace(config, **{section: part})
    return config


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("good")
    teaching = ["--salt.kd_steps", "40", "--teacher.checkpoint", "slm"]
    return parse_command_line([*write_files(folder), *teaching]).config


@pytest.mark.parametrize(
    ("settings", "message"), CONTRADICTIONS, ids=[str(c[0]) for c in CONTRADICTIONS]
)
def test_contradiction_is_refused(settings: dict[str, Any], message: str, good: RunConfig) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        check_config(changed(good, settings))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"salt.kd_steps": 100},
        {"salt.kd_steps": 0, "teacher.checkpoint": None},
        {"salt.transition": "wsd", "salt.transition_steps": 30, "salt.warmup_steps": 10},
        {"parallel.tensor_model_parallel_size": 4, "parallel.sequence_parallel": True},
        {"parallel.pipeline_model_parallel_size": 4},
        {"model.max_position_embeddings": 16},  # rope needs no table
        {"data.objective": ["0.6", "causal", "0.2", "prefix", "0.2", "span_corruption"]},
        {"data.objective": ["prefix"], "data.seq_length": 3},
        {"data.tags": ["a", "b"], "data.objective": ["1", "causal", "1", "prefix"]},
        {"salt.selection": ["a", "b"], "salt.kd_weight": 0.0, "teacher.checkpoint": None},
        {"salt.kd_tokens": "high_entropy", "salt.kd_token_share": 0.85},
        LOGITS,
        {**LOGITS, "salt.truncate_p": 0.9, "salt.lost_mass": "to_label"},
        {"salt.truncate_k": 50, "salt.truncate_p": 0.9, "salt.teacher_temperature": 2.0},
        {**LOGITS, **ADAPTIVE, "salt.divergence": "mse_probabilities"},
        HF,
        {**HF, "teacher.forward_chunks": 1},
        {**HF, "salt.ce_tokens": "excess_loss", "salt.ce_token_share": 0.5},
        {**HF, **ADAPTIVE},
        ADAPTIVE,
        {**ADAPTIVE, "salt.min_kd_steps": 39, "salt.switch_margin_nats": -0.1},
        {**ADAPTIVE, "salt.switch_better_share": 0.4, "salt.switch_patience": 3},
        {
            **ADAPTIVE,
            "salt.transition": "wsd",
            "salt.transition_steps": 14,
            "salt.warmup_steps": 25,
        },
        {
            "data.tags": ["a", "b"],
            "salt.ce_tokens": "excess_loss",
            "salt.ce_token_share": 0.6,
            "salt.kd_weight": 0.0,
            "teacher.checkpoint": None,
        },
    ],
    ids=str,
)
def test_what_fits_is_accepted(settings: dict[str, Any], good: RunConfig) -> None:
    check_config(changed(good, settings))


def test_contradictions_are_listed_all_at_once(good: RunConfig) -> None:
    wrong = {"salt.kd_weight": 2.0, "train.min_lr_ratio": -1.0, "train.eval_interval": -3}
    with pytest.raises(ValueError) as error:
        check_config(changed(good, wrong))
    first, *lines = str(error.value).splitlines()
    assert first == "3 settings are wrong:"
    assert sorted(line.split(" = ")[0].strip() for line in lines) == sorted(wrong)


def test_contradiction_ends_the_command_line(refused: Callable[..., str]) -> None:
    assert "teacher.checkpoint is not set" in refused("--salt.kd_steps", "3")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write_json(**changes: Any) -> str:
        path = tmp_path / "changed.json"
        values = {key: value for key, value in (DEEPSPEED | changes).items() if value is not None}
        path.write_text(json.dumps(values))
        return str(path)

    return write_json


def settings_of(path: str, dp: int = 1) -> DeepSpeedSettings:
    return load_deepspeed_config(path, data_parallel_size=dp)


def test_deepspeed_json_is_read(write: Callable[..., str]) -> None:
    settings = settings_of(write(bf16={"enabled": True}, zero_optimization={"stage": 2}), dp=4)
    assert (settings.micro_batch_size, settings.num_micro_batches) == (2, 3)
    assert (settings.global_batch_size, settings.data_parallel_size) == (24, 4)
    assert (settings.precision, settings.zero_stage, settings.learning_rate) == ("bf16", 2, 3e-4)
    assert settings_of(write()).precision == "fp32"
    assert settings_of(write(bf16={"enabled": False}, fp16={"enabled": True})).precision == "fp16"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_batchsize": 3}, ["unknown key 'train_batchsize'", "'train_batch_size'"]),
        ({"zero_optimisation": {}}, ["'zero_optimisation'", "'zero_optimization'"]),
        ({"train_batch_size": "auto"}, ["'train_batch_size' is \"auto\"", "write the number"]),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, ["'optimizer.params.lr'"]),
        ({"optimizer": {"type": "AdamW", "params": {}}}, ['"optimizer"', "lr"]),
        ({"optimizer": {"params": {"lr": 1}}}, ['"optimizer"', "type"]),
        ({"optimizer": "AdamW"}, ["optimizer = 'AdamW'", "object"]),
        ({"bf16": True}, ["bf16 = True", "object"]),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, ["bf16 and fp16"]),
        ({"fp16": {"enabled": True, "auto_cast": True}}, ["fp16.auto_cast"]),
        ({"zero_optimization": {"stage": 1, "cpu_offload": True}}, ["cpu_offload", "offload_opt"]),
        ({"data_types": {"grad_accum_dtype": "float32"}}, ["grad_accum_dtype", "'fp32'"]),
        ({"zero_optimization": {"stage": 4}}, ["zero_optimization.stage = 4"]),
        ({"train_micro_batch_size_per_gpu": 0}, ["train_micro_batch_size_per_gpu = 0"]),
        ({"gradient_accumulation_steps": 1.5}, ["gradient_accumulation_steps = 1.5"]),
        ({"train_micro_batch_size_per_gpu": None}, ["give train_batch_size or"]),
        ({"train_batch_size": 13}, ["train_batch_size = 13", "= 2", "= 3", "data-parallel size 1"]),
    ],
    ids=str,
)
def test_slip_in_the_deepspeed_json_is_named(
    changes: dict[str, Any], words: list[str], write: Callable[..., str]
) -> None:
    path = write(**changes)
    with pytest.raises(ValueError) as error:
        settings_of(path)
    assert str(error.value).startswith(path)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("key", REFUSED_KEYS)
def test_features_that_would_fight_with_the_trainer_are_refused(
    key: str, write: Callable[..., str]
) -> None:
    path = write(**{key: {"type": "WarmupLR"}})
    with pytest.raises(ValueError, match=f"{path}: key '{key}' is not used here: ..."):
        read_json(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n  "bf16": {\n    "enabled": true,\n  }\n}', r"broken.json:[34]:\d+: not valid JSON"),
        ("[1]", "expected a JSON object, found list"),
        ("", "broken.json:1:1: not valid JSON"),
    ],
)
def test_broken_json_is_named_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_json(str(tmp_path / "broken.json"))


def test_missing_json_is_named() -> None:
    with pytest.raises(ValueError, match=r"--deepspeed_config nowhere/ds.json: No such file"):
        read_json("nowhere/ds.json")


def test_batch_sizes_from_any_two_keys() -> None:
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    for micro in (1, 2, 5):
        for steps in (1, 3):
            for dp in (1, 2, 4):
                total = micro * steps * dp
                given = dict(zip(keys, (total, micro, steps), strict=True))
                for absent in (None, *keys):
                    values = {key: value for key, value in given.items() if key != absent}
                    assert resolve_batch_sizes(values, dp, "x") == (micro, steps, total)
    assert resolve_batch_sizes({"train_batch_size": 8}, 4, "x") == (2, 1, 8)
    assert resolve_batch_sizes({"train_micro_batch_size_per_gpu": 8}, 4, "x") == (8, 1, 32)


@pytest.mark.parametrize(
    "values",
    [
        {"train_batch_size": 10},
        {"train_batch_size": 2},
        {"train_batch_size": 12, "gradient_accumulation_steps": 2},
        {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 3},
        {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 8},
    ],
    ids=str,
)
def test_batch_sizes_that_do_not_multiply_are_refused(values: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="x: train_batch_size = .*data-parallel size 4"):
        resolve_batch_sizes(values, 4, "x")


BF16, FP32_SUMS = {"enabled": True}, {"grad_accum_dtype": "fp32"}


@pytest.mark.parametrize(
    ("parallel", "changes", "message"),
    [
        (dict(pp=2), dict(zero_optimization={"stage": 2}), "stage = 2 does not work.*size = 2"),
        (dict(pp=2), dict(zero_optimization={"stage": 3}), "stage = 3 does not work"),
        (dict(pp=2), dict(zero_optimization={"stage": 1}, bf16=BF16), "grad_accum_dtype.*fp32"),
        (dict(tp=2, sp=True), dict(pipeline={"pipe_partitioned": True}), "pipeline.pipe_partit"),
        (dict(tp=2, sp=True), dict(pipeline={"grad_partitioned": True}), "pipeline.grad_partit"),
        (dict(), dict(pipeline={"activation_checkpoint_interval": 1}), "recompute_granularity"),
        (dict(pp=1), dict(zero_optimization={"stage": 3}, bf16=BF16), "grad_accum_dtype.*fp32"),
        (dict(pp=1),
         dict(zero_optimization={"stage": 3}, bf16=BF16, data_types=FP32_SUMS), None),
        (dict(pp=1),
         dict(zero_optimization={"stage": 1}, bf16=BF16,
              data_types={"grad_accum_dtype": "bf16"}), None),
        (dict(pp=1), dict(bf16=BF16, data_types=FP32_SUMS), "bf16 with ZeRO 0"),
        (dict(pp=2), dict(zero_optimization={"stage": 1}), None),
        (dict(pp=2), dict(bf16=BF16), "bf16 with ZeRO 0"),
        (dict(pp=2),
         dict(zero_optimization={"stage": 1}, bf16=BF16, data_types=FP32_SUMS), None),
        (dict(tp=2), dict(pipeline={"pipe_partitioned": True}), None),
        (dict(), dict(fp16={"enabled": True}), "fp16 with ZeRO 0"),
        (dict(), dict(fp16={"enabled": True}, zero_optimization={"stage": 1}), None),
        (dict(pp=2), dict(flops_profiler={"enabled": True}), "flops_profiler.enabled.*= 2"),
        (dict(pp=1), dict(flops_profiler={"enabled": True}), None),
        (dict(), dict(zero_optimization={"stage": 1, "round_robin_gradients": True}),
         "round_robin_gradients.*train.check_gradients"),
        (dict(), dict(zero_optimization={"stage": 1, "compute_grad_norm": False}),
         "compute_grad_norm"),
        (dict(fuse=True), dict(zero_optimization={"stage": 2}, bf16=BF16, data_types=FP32_SUMS),
         "gradient_accumulation_fusion needs bf16"),
        (dict(fuse=True), dict(zero_optimization={"stage": 1}, bf16=BF16, data_types=FP32_SUMS),
         None),
    ],
    ids=str,
)  # fmt: skip
def test_json_that_contradicts_the_run_is_refused(
    parallel: dict[str, Any], changes: dict[str, Any], message: str | None, good: RunConfig,
    write: Callable[..., str],
) -> None:  # fmt: skip
    names = {"tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size",
             "sp": "sequence_parallel", "fuse": "gradient_accumulation_fusion"}  # fmt: skip
    config = changed(good, {f"parallel.{names[key]}": v for key, v in parallel.items()})
    settings = settings_of(write(**changes))
    if message is None:
        check_against_run(settings, config)
        return
    with pytest.raises(ValueError, match=f"(?s){settings.path}: .*{message}"):
        check_against_run(settings, config)


def test_engine_gets_the_json_with_all_three_batch_sizes(
    write: Callable[..., str], good: RunConfig
) -> None:
    settings = settings_of(write(gradient_clipping=1.0, pipeline={"seed_layers": False}), dp=4)
    before = json.dumps(settings.values)
    values = engine_config(settings, good.parallel)
    assert values["train_batch_size"] == 24
    assert (values["train_micro_batch_size_per_gpu"], values["gradient_accumulation_steps"]) == (
        2,
        3,
    )
    assert values["optimizer"] == DEEPSPEED["optimizer"] and values["gradient_clipping"] == 1.0
    assert values["pipeline"] == {"seed_layers": False}
    split = changed(good, {"parallel.tensor_model_parallel_size": 2,
                           "parallel.sequence_parallel": True})  # fmt: skip
    pipeline = engine_config(settings, split.parallel)["pipeline"]
    assert pipeline == {"seed_layers": False, "pipe_partitioned": False, "grad_partitioned": False}
    assert json.dumps(settings.values) == before, "the file's values are not changed in place"


@pytest.mark.parametrize("said", [None, True, False])
def test_16_bit_gradients_go_as_they_are_added_unless_the_json_says_otherwise(
    write: Callable[..., str], good: RunConfig, said: bool | None
) -> None:
    section = BF16 if said is None else {**BF16, "immediate_grad_update": said}
    path = write(bf16=section, data_types=FP32_SUMS, zero_optimization={"stage": 1})
    values = engine_config(settings_of(path), good.parallel)
    assert values["bf16"]["immediate_grad_update"] is (said is not False)


@pytest.mark.parametrize(
    ("changes", "speaks"),
    [
        ({}, False),
        ({"wall_clock_breakdown": True}, False),
        ({"steps_per_print": 10}, True),
        ({"memory_breakdown": True}, True),
        ({"comms_logger": {"enabled": True}}, True),
        ({"comms_logger": {"enabled": False}}, False),
    ],
    ids=str,
)
def test_deepspeed_speaks_when_it_is_asked(
    write: Callable[..., str], good: RunConfig, changes: dict[str, Any], speaks: bool
) -> None:
    assert settings_of(write(**changes)).lets_deepspeed_speak is speaks


def test_one_stage_has_no_waits_to_teach_in(good: RunConfig) -> None:
    with pytest.raises(ValueError, match="teacher.placement = bubble: one stage has no waits"):
        check_config(changed(good, {"teacher.placement": "bubble"}))
    check_config(changed(good, {"teacher.placement": "bubble",
                                "parallel.pipeline_model_parallel_size": 2}))  # fmt: skip


QUICKLY_S = 30.0  # about one second here; importing torch and deepspeed alone costs several
PROBE = """
import sys
from megatron_salt.pretrain import main
try:
    main(sys.argv[1:])
except SystemExit as stopped:
    heavy = {"torch", "deepspeed", "megatron", "numpy"} & set(sys.modules)
    print("HEAVY", sorted(heavy), stopped.code)
"""


@pytest.mark.processes
@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (["--help", "salt"], "0", "--salt.kd_steps"),
        (["--train.stepps", "3"], "2", "'train.steps'"),
        (["--salt.kd_steps", "3"], "2", "teacher.checkpoint is not set"),
    ],
)
def test_help_and_slips_answer_without_importing_torch(
    options: list[str], code: str, text: str, files: list[str]
) -> None:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *files, *options], capture_output=True, text=True, check=True
    )
    assert time.monotonic() - started < QUICKLY_S
    assert f"HEAVY [] {code}" in done.stdout
    assert text in done.stdout + done.stderr


def test_help_explains_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    def shown(*words: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            parse_command_line(words)
        assert stopped.value.code == 0
        return capsys.readouterr().out

    overview = shown("--help")
    assert overview.count("\n") < 24 and all(f"\n  {name} " in overview for name in SECTIONS)
    sections = "".join(shown("--config", "absent.yaml", "-h", name) for name in SECTIONS)
    assert all(sections.count(f"--{key} (") == 1 for key in KEYS)
    assert "--salt.kd_steps (whole number; default: 0):\n  Length n_KD of the KD" in sections
    assert shown("--help", "train.steps").startswith("--train.steps (whole number; required):")
    assert len(KEYS) <= 94


def test_data_prefixes_and_weights_on_the_command_line(files: list[str]) -> None:
    def paths(*options: str) -> list[str]:
        return list(parse_command_line([*files, *options]).config.data.train_data_path)

    assert paths("--data.train_data_path", "[0.5, x, 0.5, y]") == ["0.5", "x", "0.5", "y"]
    appended = paths("--data.train_data_path=[1, x, 2]", "--data.train_data_path+=y")
    assert appended == ["1", "x", "2", "y"]
