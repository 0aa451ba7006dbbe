"""The example configs: each resolves, and its model has the size that its name or comment says."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_salt.config.command_line import parse_command_line
from megatron_salt.config.fields import RunConfig
from megatron_salt.model.weights import num_parameters

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
DEEPSPEED = CONFIGS.parent / "deepspeed" / "paper_zero1_bf16.json"
RECIPES = ("pd_best", "pd_vanilla")
# Parameters of the name, and the vocabulary that they are counted with.
SIZES = {
    "paper_1.5b_teacher": (1.5e9, 32_000), "paper_2.8b_student": (2.8e9, 32_000),
    "pd_330m": (330e6, 151_552), "pd_670m": (670e6, 151_552), "pd_1.9b": (1.9e9, 151_552),
    "pd_3.8b": (3.8e9, 151_552), "pd_6.8b": (6.8e9, 151_552),
}  # fmt: skip
ALONE = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem not in RECIPES)


def resolved(*names: str) -> RunConfig:
    words = [word for name in names for word in ("--config", str(CONFIGS / f"{name}.yaml"))]
    return parse_command_line([*words, "--deepspeed_config", str(DEEPSPEED)]).config


@pytest.mark.parametrize("name", ALONE)
def test_a_config_resolves_at_its_size(name: str) -> None:
    config = resolved(name)
    if name in SIZES:
        size, vocab_size = SIZES[name]
        counted = num_parameters(config.model, vocab_size, config.data.seq_length)
        assert counted == pytest.approx(size, rel=0.03)


def test_sizes_are_those_of_all_that_have_one_in_their_name() -> None:
    assert set(SIZES) == {name for name in ALONE if any(digit in name for digit in "0123456789")}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("size", [name for name in ALONE if name.startswith("pd_")])
def test_a_recipe_teaches_every_size_for_the_whole_run(size: str, recipe: str) -> None:
    config, baseline = resolved(size, recipe), resolved(size)
    assert config.teacher.kind == "logits" and baseline.teacher.kind is None
    assert config.salt.kd_steps == config.train.steps == baseline.train.steps
    assert (config.model, config.data) == (baseline.model, baseline.data)
    assert (config.data.objective, config.data.seq_length, config.data.windows) == (
        ["causal"], 4096, True,
    )  # fmt: skip


def test_recipes_are_those_of_the_paper() -> None:
    best, vanilla = (resolved("pd_1.9b", recipe) for recipe in RECIPES)
    salt = best.salt
    assert (salt.truncate_p, salt.truncate_k, salt.teacher_temperature) == (0.95, 50, 2.0)
    assert (salt.kd_weight, salt.transition, best.train.lr_schedule) == (0.9, "wsd", "wsd")
    # Weight and learning rate rise and fall together.
    assert salt.warmup_steps == best.train.lr_warmup_steps
    assert salt.transition_steps == best.train.lr_decay_steps
    salt = vanilla.salt
    assert (salt.truncate_p, salt.truncate_k, salt.teacher_temperature) == (0.95, 100, 1.0)
    assert (salt.kd_weight, salt.transition) == (1.0, "constant")


def test_the_length_is_100_billion_tokens() -> None:
    batch = yaml.safe_load(DEEPSPEED.read_text(encoding="utf-8"))["train_batch_size"]
    for name in ALONE:
        if name.startswith("pd_"):
            config = resolved(name)
            tokens = config.train.steps * batch * config.data.seq_length
            assert tokens == pytest.approx(100e9, rel=1e-4)
