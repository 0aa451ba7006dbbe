"""Runs taught by stored logits: equal to runs with the teacher itself, wherever they can be."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import RankError, run_ranks
from tiny import (
    LLAMA,
    adam_gradient,
    allow_fp16_on_cpu,
    cut_back,
    first_moments,
    local_weights,
    make_config,
    make_deepspeed,
    metrics_of,
    run_to_end,
    whole_weights,
    without_times,
)
from tiny_logits import make_settings, write_logits
from tiny_tags import write_indexed

from megatron_salt.checkpoint.folder import resolve
from megatron_salt.checkpoint.manifest import read_checkpoint_manifest
from megatron_salt.checkpoint.weights import load_frozen
from megatron_salt.config.fields import RunConfig
from megatron_salt.data.dataset import find_tokenizer
from megatron_salt.data.logits import LogitsSettings
from megatron_salt.data.tags import open_indexed, read_stream, sequence_lengths
from megatron_salt.kernels import VocabShard
from megatron_salt.model.weights import DTYPES
from megatron_salt.parallel.groups import initialize
from megatron_salt.planner.dry_run import describe_run
from megatron_salt.scoring.capture import LogitsRequest, cache_logits
from megatron_salt.training.run import prepare

pytestmark = pytest.mark.distributed

WINDOW, VOCAB_SIZE, KD_STEPS, STEPS = 16, 509, 4, 6
KD: dict[str, Any] = {
    "salt__kd_steps": KD_STEPS, "salt__kd_weight": 0.7, "train__steps": STEPS,
    "model": {**LLAMA, "num_query_groups": 4}, "data__windows": True,
    "salt__transition": "linear_decay", "salt__transition_steps": 2,
}  # fmt: skip
TP2_PP2: dict[str, Any] = {
    "parallel__tensor_model_parallel_size": 2, "parallel__pipeline_model_parallel_size": 2,
    "parallel__sequence_parallel": True,
}  # fmt: skip
TWO_MICRO_BATCHES = {"train_batch_size": 4, "zero_optimization": {"stage": 1}}


def teacher_logprobs(data: Path, teacher: Path, eod: int, dtype: torch.dtype) -> np.ndarray:
    """Log-softmax of the teacher at every token, [tokens, V], window by window, fp32."""
    groups = initialize(1, 1, 1.0)
    manifest = read_checkpoint_manifest(folder := resolve(str(teacher), what="teacher"))
    model = load_frozen(
        folder, manifest, groups, seq_length=WINDOW, dtype=dtype, head_columns=VOCAB_SIZE,
        head=VocabShard(size=VOCAB_SIZE, start=0, stop=VOCAB_SIZE),
    )  # fmt: skip
    tokens = int(sequence_lengths(data).sum())
    text = np.concatenate([[eod], read_stream(open_indexed(data), 0, tokens - 1)]).astype(np.int64)
    found = []
    for start in range(0, tokens - WINDOW + 1, WINDOW):
        row_BS = torch.from_numpy(text[start : start + WINDOW])[None]
        hidden_SE = model.forward(row_BS)[0]
        found.append((hidden_SE.float() @ model.head_WE.float().T).log_softmax(dim=1))
    return torch.cat(found).numpy()


@dataclasses.dataclass(frozen=True)
class Cache:
    """Writes logits of the fixture's dataset, as much of them as is asked for."""

    dataset: Path
    logp_TV: np.ndarray
    tokenizer: str
    folder: Path

    def write(self, name: str, **changes: Any) -> str:
        settings: LogitsSettings = make_settings(encoding="fp32", **changes)
        order_TK = np.argsort(-self.logp_TV, axis=1, kind="stable")[:, : settings.top_k]
        kept_TK = np.take_along_axis(self.logp_TV, order_TK, axis=1)
        tokens = int(sequence_lengths(self.dataset).sum())
        p_TV = np.exp(self.logp_TV.astype(np.float64))
        rest_T = np.log(np.maximum(1 - np.exp(kept_TK.astype(np.float64)).sum(axis=1), 1e-30))
        labels = read_stream(open_indexed(self.dataset), 0, len(self.logp_TV)).astype(np.int64)
        of_token = {
            "rest": rest_T, "entropy": -(p_TV * self.logp_TV).sum(axis=1),
            "loss": -np.take_along_axis(self.logp_TV, labels[:, None], axis=1)[:, 0],
        }  # fmt: skip
        values_TK = kept_TK
        if settings.kind == "sampled":
            draws = [np.random.default_rng(i).multinomial(settings.draws, p / p.sum())
                     for i, p in enumerate(p_TV)]  # fmt: skip
            order_TK = np.argsort(-np.array(draws), axis=1, kind="stable")[:, : settings.top_k]
            values_TK = np.take_along_axis(np.array(draws), order_TK, axis=1)

        # The last window is not whole, and is never read.
        def filled(x: np.ndarray) -> np.ndarray:
            return np.concatenate([x, x[: tokens - len(x)]])

        write_logits(
            self.folder / name, self.dataset, settings, filled(order_TK).astype(np.int32),
            filled(values_TK), {k: filled(v).astype(np.float32) for k, v in of_token.items()},
            tokenizer=self.tokenizer,
        )  # fmt: skip
        return str(self.folder / name)


def make_cache(dataset: Path, teacher: Path, folder: Path, precision: str = "fp32") -> Cache:
    config = make_config(dataset, folder / "none")
    tokenizer = find_tokenizer(config.data)
    arguments = (dataset, teacher, tokenizer.eod, DTYPES[precision])
    logp_TV = run_ranks(1, teacher_logprobs, *arguments)[0]
    return Cache(dataset, logp_TV, tokenizer.fingerprint, folder)


@pytest.fixture(scope="module")
def cache(dataset: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(dataset, teacher, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def whole(cache: Cache) -> str:
    """Every token of the vocabulary, as fp32."""
    return cache.write("whole", top_k=VOCAB_SIZE)


def _moments(config: RunConfig, deepspeed: str) -> dict[int, dict[str, np.ndarray]]:
    allow_fp16_on_cpu()
    run, found = prepare(config, deepspeed), {}
    for step in range(KD_STEPS + 1):
        run.step(step)
        if step in (0, KD_STEPS - 1, KD_STEPS):
            found[step + 1] = first_moments(run)
    run.finish()
    return found


def gradients(
    config: RunConfig, deepspeed: str, ranks: int
) -> tuple[list[dict[str, Any]], dict[int, dict[str, np.ndarray]]]:
    """Metrics, and whole gradients of the first step and of the first one of the LM phase."""
    per_rank = run_ranks(ranks, _moments, config, deepspeed)
    found = {}
    for step in (1, KD_STEPS + 1):
        of_rank = [adam_gradient(moments, step) for moments in per_rank]
        found[step] = whole_weights(of_rank, config, VOCAB_SIZE)
    return metrics_of(config.train.output_dir), found


def assert_same(
    got: tuple[Any, dict[int, dict[str, np.ndarray]]], expected: Any, tolerance: float
) -> None:
    for mine, theirs in zip(got[0], expected[0], strict=True):
        for key in ("loss", "ce_nats", "kl_nats", "grad_norm", "valid_ce_nats"):
            if theirs.get(key) is not None:
                # A small KL is the difference of two sums of several nats.
                near = pytest.approx(theirs[key], rel=tolerance, abs=tolerance)
                assert mine[key] == near, (key, mine["step"])
    for step, of_weight in expected[1].items():
        for name, theirs in of_weight.items():
            error = np.linalg.norm(got[1][step][name] - theirs) / np.linalg.norm(theirs)
            assert error < 10 * tolerance, (step, name, error)


@pytest.fixture(scope="module")
def online(dataset: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The teacher in the run, one rank."""
    folder = tmp_path_factory.mktemp("online")
    config = make_config(dataset, folder / "run", teacher__checkpoint=str(teacher), **KD)
    return gradients(config, make_deepspeed(folder), 1)


@pytest.mark.parametrize(
    ("ranks", "layout", "deepspeed"),
    [
        (1, {}, {}),
        (4, TP2_PP2, {"train_micro_batch_size_per_gpu": 4}),
        (4, {"parallel__tensor_model_parallel_size": 4}, {}),
        (2, {}, {"train_micro_batch_size_per_gpu": 1}),
    ],
    ids=["one", "tp2-pp2-sp", "tp4", "dp2"],
)
def test_all_of_the_vocabulary_teaches_as_the_teacher_does(
    ranks: int, layout: dict[str, Any], deepspeed: dict[str, Any], whole: str, online: Any,
    dataset: Path, tmp_path: Path,
) -> None:  # fmt: skip
    config = make_config(dataset, tmp_path / "run", teacher__logits=[whole], **KD, **layout)
    assert_same(gradients(config, make_deepspeed(tmp_path, **deepspeed), ranks), online, 1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bits_are_as_right_as_with_the_teacher(
    precision: str, dataset: Path, teacher: Path, online: Any, tmp_path: Path
) -> None:
    """Against fp32, weight by weight, at tp 2 and pp 2. The teacher computes in 16 bits in both."""
    stored = make_cache(dataset, teacher, tmp_path, precision).write("whole", top_k=VOCAB_SIZE)
    sections: dict[str, Any] = {
        precision: {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"},
        **TWO_MICRO_BATCHES, "train_batch_size": 8,
    }  # fmt: skip
    if precision == "fp16":
        sections[precision]["initial_scale_power"] = 8
    deepspeed = make_deepspeed(tmp_path, **sections)
    found = {}
    for name, who in (("logits", [stored]), ("checkpoint", str(teacher))):
        given: dict[str, Any] = {f"teacher__{name}": who}
        config = make_config(dataset, tmp_path / name, **given, **KD, **TP2_PP2)
        found[name] = gradients(config, deepspeed, 4)[1]
    for step, of_weight in online[1].items():
        for name, right in of_weight.items():
            size = np.linalg.norm(right)
            mine, theirs = (
                np.linalg.norm(found[who][step][name] - right) / size
                for who in ("logits", "checkpoint")
            )
            assert mine < 1.2 * theirs + 1e-3, (step, name, mine, theirs)


def _weights(config: RunConfig, deepspeed: str) -> dict[str, np.ndarray]:
    return local_weights(run_to_end(config, deepspeed))


def test_resumed_runs_are_bit_equal(whole: str, dataset: Path, tmp_path: Path) -> None:
    """Cut off within the KD phase, and at the switch."""
    config = make_config(
        dataset, tmp_path / "run", teacher__logits=[whole], **KD, **TP2_PP2,
        train__checkpoint_interval=2, train__keep_checkpoints=0, salt__truncate_k=40,
        salt__lost_mass="ghost",
    )  # fmt: skip
    deepspeed = make_deepspeed(tmp_path, **TWO_MICRO_BATCHES)
    expected = run_ranks(4, _weights, config, deepspeed)
    for step in (2, KD_STEPS):
        folder = tmp_path / f"cut_{step}"
        cut_back(tmp_path / "run", folder, step)
        train = dataclasses.replace(config.train, output_dir=str(folder))
        resumed = dataclasses.replace(config, train=train)
        if step == KD_STEPS:  # they are not needed any more, and may be gone
            gone = dataclasses.replace(config.teacher, logits=[str(tmp_path / "gone")])
            resumed = dataclasses.replace(resumed, teacher=gone)
        again = run_ranks(4, _weights, resumed, deepspeed)
        for mine, theirs in zip(again, expected, strict=True):
            for name, weight in theirs.items():
                np.testing.assert_array_equal(mine[name], weight, err_msg=name)
        assert without_times(metrics_of(folder)) == without_times(metrics_of(tmp_path / "run"))


def test_a_run_goes_on_with_the_same_logits_only(
    whole: str, cache: Cache, dataset: Path, teacher: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {**KD, "train__checkpoint_interval": 2, "train__keep_checkpoints": 0}
    config = make_config(dataset, tmp_path / "run", teacher__logits=[whole], **settings)
    run_ranks(1, _weights, config, deepspeed := make_deepspeed(tmp_path))
    for name, who in (("logits", [cache.write("other", top_k=9)]), ("checkpoint", str(teacher))):
        shutil.rmtree(tmp_path / "cut", ignore_errors=True)
        cut_back(tmp_path / "run", tmp_path / "cut", 2)
        given: dict[str, Any] = {f"teacher__{name}": who}
        other = make_config(dataset, tmp_path / "cut", **given, **settings)
        with pytest.raises(RankError, match=r"(another|a) teacher|other weights than the teacher"):
            run_ranks(1, _weights, other, deepspeed)


CUTS: dict[str, dict[str, Any]] = {
    "top-p-k": {"truncate_k": 30, "truncate_p": 0.3, "teacher_temperature": 2.0},
    "to the label": {"truncate_k": 5, "lost_mass": "to_label", "student_temperature": 1.5},
    "ghost": {"truncate_k": 5, "lost_mass": "ghost"},
    "squares": {"truncate_k": 30, "lost_mass": "raw", "divergence": "mse_probabilities"},
    "by entropy": {"truncate_k": 30, "kd_tokens": "low_entropy", "kd_token_share": 0.5},
    "where better": {"truncate_k": 30, "kd_tokens": "teacher_better"},
    "largest gaps": {"truncate_k": 30, "ce_tokens": "excess_loss", "ce_token_share": 0.5},
}


def _one_after_another(configs: list[RunConfig], deepspeed: str) -> None:
    for config in configs:
        run_to_end(config, deepspeed)


@pytest.fixture(scope="module")
def cut_runs(
    cache: Cache, dataset: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Of each of CUTS a run from files and one with the teacher, in one start of two ranks."""
    folder, configs = tmp_path_factory.mktemp("cuts"), []
    for name, cut in CUTS.items():
        settings: dict[str, Any] = {
            **KD, "train__steps": 2, "salt__kd_steps": 2, "salt__transition": "step",
            "salt__transition_steps": 0, "parallel__tensor_model_parallel_size": 2,
            **{f"salt__{key}": value for key, value in cut.items()},
        }  # fmt: skip
        stored = cache.write(name.replace(" ", "_"), top_k=cut["truncate_k"])
        for setting, who in (("logits", [stored]), ("checkpoint", str(teacher))):
            given: dict[str, Any] = {f"teacher__{setting}": who}
            if setting == "logits":  # what is stored is cut already; the other settings hold
                given["salt__truncate_k"] = None
            configs.append(make_config(dataset, folder / name / setting, **{**settings, **given}))
    run_ranks(2, _one_after_another, configs, make_deepspeed(folder))
    return folder


@pytest.mark.parametrize("name", CUTS)
def test_a_teacher_cut_online_teaches_as_stored_logits_do(name: str, cut_runs: Path) -> None:
    records = [metrics_of(cut_runs / name / each)[1:] for each in ("logits", "checkpoint")]
    for mine, theirs in zip(*records, strict=True):
        assert theirs["kl_nats"] != 0
        for key in ("loss", "kl_nats", "grad_norm", "taught_share", "ce_share"):
            assert mine[key] == pytest.approx(theirs[key], rel=2e-5, abs=2e-6), key


@pytest.mark.parametrize("context", ["document", "window"])
def test_what_is_stored_of_a_token_meets_the_token(
    context: str, cache: Cache, dataset: Path, tmp_path: Path
) -> None:
    """A teacher that knows every token: the KL to it is the cross-entropy. Two datasets in one
    blend; rows of shuffled documents, and windows."""
    other, lengths = tmp_path / "other", sequence_lengths(dataset)
    text = read_stream(open_indexed(dataset), 0, int(lengths.sum()))
    write_indexed(other, np.split(text, np.cumsum(lengths)[:-1])[::-1])
    stored = []
    for data in (dataset, other):
        labels = read_stream(open_indexed(data), 0, len(cache.logp_TV)).astype(np.int64)
        knows_TV = np.full(cache.logp_TV.shape, -1e4, np.float32)
        knows_TV[np.arange(len(labels)), labels] = 0.0
        knowing = Cache(Path(data), knows_TV, cache.tokenizer, tmp_path)
        stored.append(knowing.write(f"of_{Path(data).name}", top_k=2, context=context))
    config = make_config(
        "", tmp_path / "run", **{**KD, "data__windows": False}, teacher__logits=stored,
        data__train_data_path=["0.5", str(dataset), "0.5", str(other)],
        data__tokenizer=str(find_tokenizer(make_config(dataset, "none").data).path),
    )  # fmt: skip
    run_ranks(2, _weights, config, make_deepspeed(tmp_path))
    for record in metrics_of(tmp_path / "run")[1 : KD_STEPS + 1]:
        assert record["kl_nats"] == pytest.approx(record["ce_nats"], rel=1e-6)


def _capture(request: LogitsRequest) -> None:
    cache_logits(request, initialize(1, 1, 1.0))


def test_the_adaptive_switch_goes_by_stored_losses(
    cache: Cache, dataset: Path, teacher: Path, tmp_path: Path
) -> None:
    """As with the teacher: the same decisions, and the same numbers of it in every evaluation."""
    settings: dict[str, Any] = {
        "data__windows": True, "salt__switch": "adaptive", "salt__switch_margin_nats": 0.2,
        "salt__kd_steps": 7, "salt__min_kd_steps": 3, "train__steps": 8, "train__eval_interval": 1,
    }  # fmt: skip
    online = make_config(dataset, tmp_path / "run", teacher__checkpoint=str(teacher), **settings)
    (tmp_path / "run.yaml").write_text(json.dumps(online.to_dict()), encoding="utf-8")
    stored = str(tmp_path / "stored")
    run_ranks(1, _capture, LogitsRequest(
        data=str(dataset), teacher=str(teacher), output_prefix=stored, window=WINDOW, kind="full",
        held_out=str(tmp_path / "run.yaml"),
    ))  # fmt: skip
    deepspeed = make_deepspeed(tmp_path)
    run_ranks(1, _weights, online, deepspeed)
    offline = make_config(dataset, tmp_path / "offline", teacher__logits=[stored], **settings)
    run_ranks(1, _weights, offline, deepspeed)
    expected, found = (without_times(metrics_of(tmp_path / x)) for x in ("run", "offline"))
    assert expected[-1]["kd_end_step"] == 3 and "teacher_valid_ce_easy_nats" in expected[-1]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            exact = key.startswith("teacher_valid") or key in ("switch_streak", "kd_end_step")
            near = (
                value
                if exact or value is None or isinstance(value, str)
                else pytest.approx(value, rel=1e-5, abs=1e-5)
            )
            assert mine[key] == near, (key, mine["step"])
    without = cache.write("no_held_out", top_k=9)
    refused = make_config(dataset, tmp_path / "refused", teacher__logits=[without], **settings)
    assert "teacher: its stored logits; no model is loaded" in describe_run(offline, deepspeed)
    with pytest.raises(RankError, match="adaptive goes by the teacher's losses; .*--held-out"):
        run_ranks(1, _weights, refused, deepspeed)
