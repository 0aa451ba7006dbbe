"""Numbers that mean something else are refused before anything starts, by file or flag and key."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_salt.config.command_line import check_yaml_keys
from megatron_salt.config.deepspeed import DeepSpeedSettings, load_deepspeed_config
from megatron_salt.config.fields import SECTIONS, RunConfig
from megatron_salt.config.problems import check_config
from megatron_salt.planner.times import read_measured

INF, NAN, HUGE = float("inf"), float("nan"), 10**400  # HUGE: JSON's, and no float
NEVER: tuple[Any, ...] = (NAN, INF, -INF, HUGE, -HUGE, True, "x", "1", None, [1], {}, -1)
ZERO = "zero_optimization"

# Dotted keys of the DeepSpeed JSON and what each refuses.
REFUSED_IN_JSON: list[tuple[str, Any]] = [
    *(
        (key, value)
        for key in ("gradient_clipping", "optimizer.params.lr", "optimizer.params.weight_decay",
                    "optimizer.params.eps", "optimizer.params.momentum", "fp16.loss_scale",
                    "fp16.hysteresis", f"{ZERO}.reduce_bucket_size", f"{ZERO}.sub_group_size")
        for value in NEVER
    ),
    *(("optimizer.params.betas", value)
      for value in (0.9, "x", [0.9], [0.9, 1.0], [-0.1, 0.9], [0.9, NAN], [True, 0.9], {"a": 1},
                    [0.9, 0.99, 0.999])),
    ("gradient_predivide_factor", 0),
    ("gradient_predivide_factor", NAN),
    ("fp16.initial_scale_power", 128),
    ("fp16.initial_scale_power", 1.5),
    ("fp16.initial_scale_power", True),
    ("fp16.loss_scale_window", 0),
    ("fp16.loss_scale_window", INF),
    ("fp16.hysteresis", 0),
    ("fp16.min_loss_scale", 0),
    ("fp16.min_loss_scale", 0.5),
    ("fp16.enabled", "false"),
    ("bf16.enabled", 1),
    (f"{ZERO}.stage", True),
    (f"{ZERO}.stage", 1.5),
    (f"{ZERO}.stage", [1]),
    (f"{ZERO}.reduce_bucket_size", 0),
    (f"{ZERO}.allgather_bucket_size", 0),
    (f"{ZERO}.stage3_prefetch_bucket_size", True),
    (f"{ZERO}.stage3_param_persistence_threshold", True),
    (f"{ZERO}.stage3_model_persistence_threshold", 0.5),
    (f"{ZERO}.stage3_max_live_parameters", -1),
    (f"{ZERO}.stage3_max_reuse_distance", NAN),
    # Keys without a range of their own.
    ("train_batch_size", INF),
    ("aio.block_size", HUGE),
    ("optimizer.params.lr_list", [0.1, NAN]),
]  # fmt: skip
TAKEN_IN_JSON: list[tuple[str, Any]] = [
    ("optimizer.params.lr", 0),
    ("optimizer.params.lr", 1e9),
    ("gradient_clipping", 0),
    ("gradient_clipping", 1e30),
    ("gradient_clipping", 10**300),
    ("gradient_predivide_factor", 0.5),
    ("optimizer.params.betas", [0, 0.999]),
    ("optimizer.params.momentum", 1.0),
    ("fp16.loss_scale", 0),
    ("fp16.initial_scale_power", 0),
    ("fp16.loss_scale_window", 1e3),
    (f"{ZERO}.stage", 3.0),
    (f"{ZERO}.reduce_bucket_size", 5e8),
    (f"{ZERO}.sub_group_size", 10**12),
    (f"{ZERO}.stage3_max_reuse_distance", 0),
    ("zero_allow_untested_optimizer", True),
]
Load = Callable[[str, Any], DeepSpeedSettings]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Read a JSON that is good but for one key."""

    def attempt(key: str, value: Any) -> DeepSpeedSettings:
        values: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        }
        *sections, last = key.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
        (tmp_path / "ds.json").write_text(json.dumps(values))
        return load_deepspeed_config(str(tmp_path / "ds.json"), 1)

    return attempt


@pytest.mark.parametrize(("key", "value"), REFUSED_IN_JSON, ids=lambda x: str(x)[:40])
def test_number_of_the_json_is_refused(key: str, value: Any, load: Load, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        load(key, value)
    shown = json.dumps(value)[:40]
    assert str(error.value).startswith(f"{tmp_path}/ds.json: {key} = {shown}: must be ")


@pytest.mark.parametrize(("key", "value"), TAKEN_IN_JSON, ids=str)
def test_legal_number_of_the_json_stays_legal(key: str, value: Any, load: Load) -> None:
    settings = load(key, value)
    if key.endswith(".lr"):
        assert settings.learning_rate == value
    if key.endswith(".stage"):
        assert settings.zero_stage == 3 and type(settings.zero_stage) is int


@pytest.mark.parametrize("params", [[], 5, None, "lr"], ids=str)
def test_parameters_of_the_optimizer_are_an_object(params: Any, load: Load) -> None:
    with pytest.raises(ValueError, match=r'ds.json: needs "optimizer": {"type": .* {"lr": '):
        load("optimizer.params", params)


@pytest.mark.parametrize("key", ["pipeline", "timers"])
def test_section_that_is_no_object_is_refused(key: str, load: Load) -> None:
    with pytest.raises(ValueError, match=rf"ds.json: {key} = 5: expected an object"):
        load(key, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"gradient_clipping": 1e999}', "gradient_clipping = Infinity: must be a finite"),
        (b'{"gradient_clipping": -Infinity}', "gradient_clipping = -Infinity: must be a finite"),
        (b'{"gradient_clipping": ' + b"1" * 5000 + b"}", "not valid JSON: .*digits"),
        (b'{"gradient_clipping": ' + b"[" * 200_000, "not valid JSON"),
        (b'{"gradient_clipping": "\xff"}', "not valid JSON: .*utf-8"),
    ],
    ids=["1e999", "-Infinity", "digits", "brackets", "bytes"],
)
def test_text_that_python_reads_as_no_number(text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_bytes(text)
    with pytest.raises(ValueError, match=f"{tmp_path}/ds.json.*{message}"):
        load_deepspeed_config(str(tmp_path / "ds.json"), 1)


GOOD = {
    "model": {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2},
    "data": {"train_data_path": ["text"]},
    "train": {"steps": 5, "output_dir": "run"},
}


def run_config(name: str, value: Any) -> RunConfig:
    section, key = name.split(".")
    values = {**GOOD, section: {**GOOD.get(section, {}), key: value}}  # type: ignore[dict-item]
    return RunConfig.from_dict(values, source="test")


FLOATS = [
    f"{section}.{item.name}"
    for section, kind in SECTIONS.items()
    for item in dataclasses.fields(kind)
    if item.type == "float"
]
REFUSED_SETTINGS: list[tuple[str, Any]] = [
    *((name, value) for name in FLOATS for value in (NAN, INF, -INF, True, "1")),
    *(("parallel.timeout_minutes", value) for value in (0, -1, 1e-12, 1e18, 525_601)),
    *(
        ("data.split", value)
        for value in ("inf", "99,inf", "nan,1", "-99,1", "99,-1", "99", "98,1,1", "", "99,", "all",
                      "99;1", "1e-3,1", "99.9.9,1", "0,0", "9" * 400 + ",1", "99,1,")
    ),
    ("model.rotary_base", 0),
    ("model.rotary_base", -1),
    ("model.layernorm_epsilon", 0.0),
    ("model.init_method_std", -0.02),
    ("train.steps", HUGE),
    ("train.lr_decay_steps", HUGE),
    *(
        (f"data.{key}", ["0.5", "prefix", weight, "causal"])
        for key in ("train_data_path", "objective")
        for weight in ("nan", "inf", "-1", "0", "1e999")
    ),
    ("data.train_data_path", ["1e308", "a", "1e308", "b"]),
    ("data.train_data_path", ["nan", "a", "1", "b"]),
    ("data.objective", ["1e308", "prefix", "1e308", "causal"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), REFUSED_SETTINGS, ids=lambda x: str(x)[:40])
def test_number_of_the_config_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^(test: )?{name} = .*: (must|expected) "):
        check_config(run_config(name, value))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("parallel.timeout_minutes", 0.25),
        ("parallel.timeout_minutes", 525_600),
        ("data.split", "99,1"),
        ("data.split", " 80 , 20 "),
        ("data.split", ".5,99.5"),
        ("data.split", "100,0"),
        ("data.train_data_path", ["1e-9", "a", "1e9", "b"]),
        ("teacher.max_valid_ce_gap_nats", 1e9),
        ("salt.teacher_temperature", 1e9),
        ("train.lr_decay_steps", None),
    ],
    ids=str,
)
def test_legal_number_of_the_config_stays_legal(name: str, value: Any) -> None:
    check_config(run_config(name, value))


def test_split_that_is_not_read_is_not_checked() -> None:
    config = run_config("data.split", "969,30,1")
    data = dataclasses.replace(config.data, valid_data_path=["held_out"])
    check_config(dataclasses.replace(config, data=data))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("update_s", value) for value in (NAN, INF, HUGE, -1e-9, True, "1", None, [1.0])),
        *(("forward_s", value) for value in (1.0, [NAN], [1.0, INF], [-1.0], [True], ["1"])),
        ("teacher_row_s", INF),
    ],
    ids=lambda x: str(x)[:40],
)
def test_measured_time_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "times.json").write_text(json.dumps({"backward_s": [1.0], key: value}))
    with pytest.raises(ValueError, match=f"^--measured {tmp_path}/times.json: {key} = .*seconds"):
        read_measured(str(tmp_path / "times.json"))


@pytest.mark.parametrize("text", [b'{"update_s": ' + b"1" * 5000 + b"}", b"\xff", b"{"])
def test_measured_times_that_are_not_json_are_refused(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "times.json").write_bytes(text)
    with pytest.raises(ValueError, match=f"^--measured {tmp_path}/times.json: "):
        read_measured(str(tmp_path / "times.json"))


@pytest.mark.parametrize(
    "text",
    [
        b"salt: {kd_weight: " + b"1" * 400 + b"}",
        b"salt: {kd_weight: " + b"1" * 5000 + b"}",
        b"salt: {kd_weight: " + b"[" * 5000,
        b'salt: {kd_weight: "\xff"}',
        b'salt: {kd_weight: "\\ud800"}',
        b"salt: {kd_weight: 2001-99-99}",
    ],
    ids=["float", "digits", "brackets", "bytes", "half a pair", "date"],
)
def test_yaml_that_no_setting_can_hold_is_named(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(text)
    with pytest.raises(ValueError, match=f"{tmp_path}/run.yaml: "):
        check_yaml_keys(str(tmp_path / "run.yaml"))
