"""Runs taught by a model of transformers: every layout, through the switch and a resume."""

from __future__ import annotations

import gc
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hf_models import VOCAB_SIZE, make_hf_model, save_hf_model
from ranks import RankError, run_ranks
from tiny import (
    cut_back,
    make_config,
    make_deepspeed,
    metrics_of,
    run_to_end,
    without_times,
)
from torch import nn

from megatron_salt.checkpoint.manifest import read_checkpoint_manifest
from megatron_salt.config.fields import RunConfig
from megatron_salt.data.dataset import DataSource, find_tokenizer
from megatron_salt.data.tag_inputs import reads_reference_loss
from megatron_salt.huggingface.teacher_model import broadcast_body
from megatron_salt.parallel.groups import FailedElsewhere, initialize
from megatron_salt.planner.dry_run import describe_run
from megatron_salt.planner.inputs import read_inputs
from megatron_salt.training.run import prepare

pytest.importorskip("transformers")
STEPS, KD_STEPS, BOS = 4, 3, 1
KD: dict[str, Any] = {"salt__kd_steps": KD_STEPS, "salt__kd_weight": 0.6, "train__steps": STEPS}
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": 1}}  # fmt: skip


def _teacher(family: str, dataset: Path, folder: Path) -> Path:
    """Trained for a moment, so that it is better than guessing."""
    model = make_hf_model(family, attention_dropout=0.3)  # of which nothing may be seen
    ids = torch.from_numpy(np.fromfile(f"{dataset}.bin", dtype=np.uint16).astype(np.int64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(30):
        rows = ids[step * 512 : (step + 1) * 512].view(8, 64)
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return save_hf_model(model, folder, dataset.parent / "tokenizer.model")


@pytest.fixture(scope="module")
def teachers(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama, and a Phi, whose output head has a bias."""
    folder = tmp_path_factory.mktemp("hf")
    return {family: _teacher(family, dataset, folder / family) for family in ("llama", "phi")}


def _train(config: RunConfig, deepspeed_config: str) -> None:
    run_to_end(config, deepspeed_config)


def run_taught(
    folder: Path, dataset: Path, teacher: Path, tp: int, pp: int, *, bf16: bool = False,
    **settings: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """Metrics of the steps of a run, from the untrained student's score on."""
    config = make_config(
        dataset, folder, teacher__hf=str(teacher), parallel__tensor_model_parallel_size=tp,
        parallel__pipeline_model_parallel_size=pp, **KD, **settings,
    )  # fmt: skip
    values = BF16 if bf16 else {}
    run_ranks(tp * pp, _train, config, make_deepspeed(folder.parent, **values))
    return metrics_of(folder)


@pytest.fixture(scope="module")
def alone(
    dataset: Path, teachers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """output_dirs of one process: the reference, and of the same run in bf16."""
    folder = tmp_path_factory.mktemp("alone")
    for name, family in {"fp32 llama": "llama", "fp32 phi": "phi", "bf16 llama": "llama"}.items():
        run_taught(
            folder / name, dataset, teachers[family], 1, 1, bf16="bf16" in name,
            train__checkpoint_interval=1, train__keep_checkpoints=0,
        )  # fmt: skip
    return {path.name: path for path in folder.iterdir() if path.is_dir()}


@pytest.mark.parametrize(
    ("name", "tp", "pp"),
    [("fp32 llama", 2, 1), ("fp32 llama", 1, 2), ("fp32 phi", 2, 2), ("bf16 llama", 2, 1),
     ("bf16 llama", 1, 2)],
)  # fmt: skip
def test_every_layout_computes_what_one_process_computes(
    alone: dict[str, Path], dataset: Path, teachers: dict[str, Path], tmp_path: Path,
    name: str, tp: int, pp: int,
) -> None:  # fmt: skip
    precision, family = name.split()
    found = run_taught(
        tmp_path / "run", dataset, teachers[family], tp, pp, bf16=precision == "bf16"
    )
    expected = metrics_of(alone[name])
    assert len(found) == len(expected) == STEPS + 1
    # bf16 has other roundings of the student's sums at another layout.
    first, later = (1e-5, 1e-5) if precision == "fp32" else (2e-3, 5e-3)
    for record, wanted in zip(found[1:], expected[1:], strict=True):
        rel = first if record["step"] == 1 else later
        assert record["phase"] == wanted["phase"] == ("kd" if record["step"] <= KD_STEPS else "lm")
        for key in ("loss", "ce_nats", *(["kl_nats"] if wanted["phase"] == "kd" else [])):
            assert record[key] == pytest.approx(wanted[key], rel=rel), (record["step"], key)
    key = "teacher_valid_ce_nats"
    assert found[-1][key] == pytest.approx(expected[-1][key], rel=first)
    assert expected[1]["kl_nats"] > 0


def test_bf16_teaches_what_fp32_does(alone: dict[str, Path]) -> None:
    exact, rounded = (metrics_of(alone[f"{name} llama"]) for name in ("fp32", "bf16"))
    for record, wanted in zip(rounded[1 : KD_STEPS + 1], exact[1:], strict=False):
        assert record["kl_nats"] == pytest.approx(wanted["kl_nats"], rel=0.03)
    assert rounded[0]["teacher_valid_ce_nats"] != exact[0]["teacher_valid_ce_nats"]


@pytest.mark.parametrize("step", [2, KD_STEPS])
def test_resumed_run_is_bit_equal(
    alone: dict[str, Path], dataset: Path, teachers: dict[str, Path], tmp_path: Path, step: int
) -> None:
    """Within the KD phase, and where it has just ended and the folder is not read."""
    cut_back(alone["fp32 llama"], tmp_path / "run", step)
    folder = tmp_path / "moved"
    if step < KD_STEPS:
        shutil.copytree(teachers["llama"], folder)  # the weights count, not where they lie
    got = run_taught(tmp_path / "run", dataset, folder, 1, 1, train__resume="auto")
    assert without_times(got) == without_times(metrics_of(alone["fp32 llama"]))


def test_resume_with_another_teacher_is_refused(
    alone: dict[str, Path], dataset: Path, teachers: dict[str, Path], tmp_path: Path
) -> None:
    cut_back(alone["fp32 llama"], tmp_path / "run", 2)
    with pytest.raises(RankError, match="other weights than the teacher that this run was resumed"):
        run_taught(tmp_path / "run", dataset, teachers["phi"], 1, 1, train__resume="auto")


def test_a_checkpoint_names_its_teacher(alone: dict[str, Path]) -> None:
    manifest = read_checkpoint_manifest(alone["fp32 llama"] / "checkpoints/step_00000004")
    assert manifest.run.teacher_fingerprint is not None
    assert manifest.run.config.teacher.hf is not None
    assert (manifest.model.bos, manifest.model.parameters) == (None, None)


def test_teacher_whose_logits_no_head_gives_fails_on_every_rank(
    dataset: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "gemma2"
    save_hf_model(make_hf_model("gemma2"), folder, dataset.parent / "tokenizer.model")
    with pytest.raises(RankError, match="gemma2.*final_logit_softcapping"):
        run_taught(tmp_path / "run", dataset, folder, 2, 1)


# The teacher's first score


def _first_score(config: RunConfig, deepspeed_config: str) -> tuple[str, list[str]]:
    run = prepare(config, deepspeed_config)
    assert run.teacher is not None
    before = run.held_out.teacher
    again = run.held_out.score_teacher(run.teacher)
    assert before is not None and run.held_out.teacher is not None
    assert torch.equal(before.loss_NS, run.held_out.teacher.loss_NS)
    return again


def _held_out_rows(config: RunConfig, cache: Path) -> tuple[np.ndarray, ...]:
    source = DataSource(
        config.data, find_tokenizer(config.data), num_samples=1, seed=0, cache_path=cache,
        held_out_only=True,
    )  # fmt: skip
    batch = source.read_held_out(range(config.train.eval_samples))
    return batch.tokens_RS.numpy(), batch.labels_RS.numpy(), batch.mask_RS.numpy()


@torch.no_grad()
def _losses(folder: Path, inputs_NS: torch.Tensor, labels_NS: torch.Tensor) -> torch.Tensor:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = model(input_ids=inputs_NS).logits
    return F.cross_entropy(logits.transpose(1, 2).double(), labels_NS, reduction="none")


def test_first_score_with_and_without_a_token_in_front(
    dataset: Path, teachers: dict[str, Path], tmp_path: Path
) -> None:
    """At tp 2 and pp 2, against transformers' own logits, over the labels that both passes see."""
    config = make_config(
        dataset, tmp_path / "run", teacher__hf=str(teachers["phi"]), data__eod_mask_loss=True,
        parallel__tensor_model_parallel_size=2, parallel__pipeline_model_parallel_size=2,
        train__eval_samples=63, **KD,
    )  # fmt: skip
    line, warnings = run_ranks(4, _first_score, config, make_deepspeed(tmp_path))[0]
    assert warnings == []  # so small a model may know little
    rows = run_ranks(1, _held_out_rows, config, tmp_path / "cache")[0]
    tokens, labels, mask = (torch.from_numpy(each) for each in rows)
    assert 0 < mask.sum() < mask.numel()  # some are masked
    plain = _losses(teachers["phi"], tokens, labels)
    behind = torch.cat([torch.full_like(tokens[:, :1], BOS), tokens], dim=1)
    of_bos = _losses(teachers["phi"], behind, torch.cat([tokens[:, :1], labels], dim=1))[:, 1:-1]
    both = mask[:, :-1].double()
    expected = [
        float((losses * weights).sum() / weights.sum())
        for losses, weights in ((plain, mask.double()), (of_bos, both), (plain[:, :-1], both))
    ]
    assert abs(expected[1] - expected[2]) > 2e-4
    assert line == (
        f"teacher {teachers['phi']}: held-out CE {expected[0]:.4f} nats/token; none was stored "
        f"with it; with token {BOS} in front of each sequence {expected[1]:.4f}, without "
        f"{expected[2]:.4f} on the same labels"
    )


def test_teacher_that_did_not_load_is_refused_on_every_rank(
    dataset: Path, teachers: dict[str, Path], tmp_path: Path
) -> None:
    """All weights there and finite, but of another order."""
    folder = tmp_path / "wrong"
    shutil.copytree(teachers["llama"], folder)
    model = make_hf_model("llama")
    save_hf_model(model, folder)  # random, three times as large as weights start
    with pytest.raises(RankError, match="worse than guessing among 509 tokens"):
        run_taught(tmp_path / "run", dataset, folder, 2, 2)


# Around the run


def _broadcast() -> list[Any]:
    """A body of which rank 1 has other values, one other dtype and another shape."""
    groups = initialize(1, 1, 5.0)
    body = nn.Linear(3, 2).requires_grad_(False)
    body.weight.fill_(groups.rank + 1.0)
    shape, dtype = ((4,), torch.float64) if groups.rank == 0 else ((2,), torch.float32)
    body.register_buffer("angles", torch.full(shape, groups.rank + 5.0, dtype=dtype))
    broadcast_body(body, groups)
    if groups.rank == 1:
        body.register_buffer("more", torch.zeros(1))
    with pytest.raises((ValueError, FailedElsewhere), match="rank 1 builds another.*'more'"):
        broadcast_body(body, groups)
    return [body.weight.numpy(), body.get_buffer("angles").numpy()]


def test_every_rank_has_rank_0s_weights_and_buffers() -> None:
    for weight, angles in run_ranks(2, _broadcast):
        np.testing.assert_array_equal(weight, np.ones((2, 3), np.float32))
        np.testing.assert_array_equal(angles, np.full(4, 5.0))
        assert angles.dtype == np.float64


def _alive_after_switch(config: RunConfig, deepspeed_config: str) -> tuple[int, int]:
    """(tensors of the teacher, those alive after the first LM step)."""
    run = prepare(config, deepspeed_config)
    assert run.teacher is not None
    model: Any = run.teacher.model
    (layer,) = model.chunk(0, 1)
    tensors = [*layer.parameters(), *layer.buffers()]
    references = [weakref.ref(each) for each in tensors]
    assert run.teacher.num_bytes() > sum(each.nbytes for each in tensors)
    del model, layer, tensors
    for step in range(KD_STEPS + 1):
        run.step(step)
    gc.collect()
    return len(references), sum(each() is not None for each in references)


def test_no_tensor_survives_the_switch(
    dataset: Path, teachers: dict[str, Path], tmp_path: Path
) -> None:
    config = make_config(
        dataset, tmp_path / "run", teacher__hf=str(teachers["llama"]),
        parallel__pipeline_model_parallel_size=2, **KD,
    )  # fmt: skip
    for before, alive in run_ranks(2, _alive_after_switch, config, make_deepspeed(tmp_path)):
        assert before > 10 and alive == 0


def test_dry_run_knows_its_size(dataset: Path, teachers: dict[str, Path], tmp_path: Path) -> None:
    config = make_config(dataset, tmp_path / "run", teacher__hf=str(teachers["llama"]), **KD)
    text = describe_run(config, make_deepspeed(tmp_path))
    count = sum(each.numel() for each in make_hf_model("llama").parameters())
    assert f"teacher: {count:,} parameters" in text
    path = make_deepspeed(tmp_path)
    size = read_inputs(config, path, 1, vocab_size=VOCAB_SIZE, teacher_config=None).teacher
    assert size is not None and size.numel(1) == count - VOCAB_SIZE * 32  # its head is not its own
    route: dict[str, Any] = {"salt__ce_tokens": "excess_loss", "salt__ce_token_share": 0.5}
    routed = make_config(
        dataset, tmp_path / "run", teacher__hf=str(teachers["llama"]), **KD, **route
    )
    assert not reads_reference_loss(routed)  # of tags: this teacher is asked instead
    assert count > VOCAB_SIZE * 32
