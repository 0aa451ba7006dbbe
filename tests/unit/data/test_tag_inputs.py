"""What a run asks of stored logits, against what they hold."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from tiny import make_config
from tiny_logits import make_settings

from megatron_salt.config.fields import RunConfig
from megatron_salt.data.logits import LogitsManifest, LogitsOrigin
from megatron_salt.data.tag_inputs import (
    TagInputs,
    check_logits_serve,
    logits_warnings,
    reads_reference_loss,
    reads_tags,
)
from megatron_salt.data.tags import DataIdentity, ModelIdentity


def make_manifest(step: int = 7, planned: int | None = 7, **settings: Any) -> LogitsManifest:
    data = DataIdentity(
        name="text", sequences=1, tokens=1, bin_bytes=2, bin_sampled_sha256="", bin_sha256=None,
        idx_sha256="",
    )  # fmt: skip
    origin = LogitsOrigin(
        data=data, tokenizer_fingerprint="tok", planned_steps=planned,
        model=ModelIdentity(fingerprint="weights", step=step, name="large"),
        settings=make_settings(**settings),
    )  # fmt: skip
    return LogitsManifest(origin=origin, entries=1, held_out=None, files={}, versions={})


def config_with(**salt: Any) -> RunConfig:
    settings = {f"salt__{name}": value for name, value in salt.items()}
    return make_config("text", "out", teacher__logits=["stored"], salt__kd_steps=2, **settings)


@pytest.mark.parametrize(
    ("stored", "salt", "problem"),
    [
        ({"top_k": 50}, {"truncate_k": 50}, ""),
        ({"top_k": 50}, {"truncate_k": 51}, "stored with 50, salt.truncate_k = 51 asks for more"),
        ({"top_p": 0.9}, {"truncate_p": 0.95}, "stored with 0.9, salt.truncate_p = 0.95 asks"),
        ({"top_p": 0.9}, {"truncate_p": 0.8, "lost_mass": "ghost"}, ""),
        ({"max_length": 32}, {}, "windows of 32 tokens, data.seq_length is 16"),
        ({"max_length": 32, "context": "document"}, {}, ""),
        ({"vocab_size": 510}, {}, "vocabulary of 510 tokens, the run's has 509"),
        ({"draws": 50}, {}, ""),
        ({"draws": 50}, {"truncate_k": 5}, r"were drawn, 50 .*salt.truncate_k = 5 would bias"),
        ({"draws": 50}, {"truncate_p": 0.5}, "salt.truncate_p = 0.5 would bias"),
        ({"draws": 50}, {"teacher_temperature": 2.0}, "teacher_temperature = 2.0 would bias"),
        ({"draws": 50}, {"lost_mass": "to_label"}, "salt.lost_mass = to_label would bias"),
    ],
)
def test_more_than_is_stored_is_refused(
    stored: dict[str, Any], salt: dict[str, Any], problem: str
) -> None:
    arguments = (Path("x.logits.json"), make_manifest(**stored), config_with(**salt), 509)
    if not problem:
        check_logits_serve(*arguments)
        return
    with pytest.raises(ValueError, match=f"^x.logits.json: .*{problem}"):
        check_logits_serve(*arguments)


@pytest.mark.parametrize(
    ("stored", "salt", "warning"),
    [
        ({"top_k": 50}, {"kd_weight": 0.95}, None),
        ({"top_k": 49}, {"kd_weight": 0.95}, "49 likeliest tokens, renormalised, at .* 0.95"),
        ({"top_k": 49}, {"kd_weight": 0.9}, None),
        ({"top_k": 49}, {"kd_weight": 0.95, "lost_mass": "ghost"}, None),
        ({"top_k": 60}, {"kd_weight": 1.0, "truncate_k": 12}, "the 12 likeliest tokens"),
        ({"draws": 12}, {"kd_weight": 1.0}, None),
        ({"step": 3, "top_k": 50}, {"kd_weight": 0.6}, "step 3 of 7: those of an early teacher"),
        ({"step": 3, "top_k": 50}, {"kd_weight": 0.5}, None),
        ({"step": 3, "planned": None, "top_k": 50}, {"kd_weight": 0.9}, None),
        ({"context": "document", "top_k": 50}, {}, "each document was read by itself"),
    ],
)
def test_what_is_known_to_do_harm_is_said(
    stored: dict[str, Any], salt: dict[str, Any], warning: str | None
) -> None:
    found = logits_warnings(config_with(**salt), [make_manifest(**stored)])
    assert len(found) == (warning is not None)
    if warning is not None:
        assert re.search(warning, found[0])


def test_the_teacher_is_all_of_its_files() -> None:
    one, two = make_manifest(top_k=50), make_manifest(top_k=49)
    assert TagInputs().teacher_fingerprint is None
    first = TagInputs(logits=(one, two)).teacher_fingerprint
    assert first == TagInputs(logits=(one, dataclasses.replace(two))).teacher_fingerprint
    assert first != TagInputs(logits=(two, one)).teacher_fingerprint
    assert TagInputs(logits=(one,)).of_windows
    assert not TagInputs(logits=(make_manifest(context="document"),)).of_windows


def test_stored_logits_bring_their_own_losses() -> None:
    """So tags beside them may be without: a file that is not there would be opened."""
    route = {"ce_tokens": "excess_loss", "ce_token_share": 0.5}
    with_logits = config_with(**route)
    assert not reads_reference_loss(with_logits) and not reads_tags(with_logits)
    tagged = make_config(
        "text", "out", data__tags=["tags"], salt__kd_steps=2, salt__kd_weight=0.0,
        **{f"salt__{name}": value for name, value in route.items()},
    )  # fmt: skip
    assert reads_reference_loss(tagged) and reads_tags(tagged)
