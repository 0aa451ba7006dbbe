"""Stored logits: what the model itself says of every token, whoever computed it and how often."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import runpy
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import run_forked
from ranks import RankError, run_ranks
from tiny import make_config, make_deepspeed

from megatron_salt.checkpoint.folder import resolve
from megatron_salt.checkpoint.manifest import read_checkpoint_manifest
from megatron_salt.checkpoint.weights import load_frozen, load_teacher_scores
from megatron_salt.config.fields import RunConfig
from megatron_salt.corpus.preprocess import preprocess
from megatron_salt.data.epochs import WindowDataset
from megatron_salt.data.logits import StoredLogits, read_logits_manifest, verify_logits
from megatron_salt.data.tags import open_indexed
from megatron_salt.data.tokenizer import load_tokenizer
from megatron_salt.kernels import VocabShard
from megatron_salt.parallel.groups import initialize
from megatron_salt.scoring import shards as shard_files
from megatron_salt.scoring.capture import LogitsRequest, LogitsScorer, cache_logits
from megatron_salt.training.run import prepare

VOCAB_SIZE = 509
MAX_LENGTH = 16  # the teacher's
SHARD = 500  # tokens: a few shards
TOP_P = 0.03  # of a model that has learnt next to nothing
KINDS: dict[str, dict[str, Any]] = {
    "top": {"encoding": "fp32"},
    "top_p": {"encoding": "fp32", "top_p": TOP_P},
    "fp16": {},
    "uint8": {"encoding": "uint8"},
    "sampled": {"kind": "sampled", "draws": 20, "encoding": "fp32"},
    "full": {"kind": "full", "top_p": 0.2, "encoding": "uint8"},  # which it does not heed
}


def _capture(requests: list[LogitsRequest], tp_size: int = 1) -> None:
    groups = initialize(tp_size, 1, 5.0)
    for request in requests:
        cache_logits(request, groups)


def request_for(dataset: Path, teacher: Path, output: Path, **changes: Any) -> LogitsRequest:
    return LogitsRequest(
        data=str(dataset), teacher=str(teacher), output_prefix=str(output),
        **{"tokens_per_shard": SHARD, "top_k": 12, **changes},
    )  # fmt: skip


def copies(made: dict[str, LogitsRequest], folder: Path, **changes: Any) -> list[LogitsRequest]:
    """Of the two kinds that compute something else."""
    return [
        dataclasses.replace(made[kind], output_prefix=str(folder / kind), **changes)
        for kind in ("top_p", "sampled")
    ]


@pytest.fixture(scope="module")
def text(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of the first 8 documents of the tests' dataset."""
    folder = tmp_path_factory.mktemp("text")
    lines = (dataset.parent / "short.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    (folder / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    preprocess([folder / "text.jsonl"], folder / "some", dataset.parent / "tokenizer.model",
               workers=1)  # fmt: skip
    return folder / "some_text_document"


@pytest.fixture(scope="module", params=[None, 12], ids=["documents", "windows"])
def captured(
    request: pytest.FixtureRequest, text: Path, even_teacher: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, LogitsRequest]:  # fmt: skip
    """Of every kind, by one rank."""
    folder = tmp_path_factory.mktemp("logits")
    made = {
        kind: request_for(text, even_teacher, folder / kind, window=request.param, **changes)
        for kind, changes in KINDS.items()
    }
    run_ranks(1, _capture, [*made.values()])
    return made


def _dense(dataset: Path, teacher: Path, window: int | None) -> tuple[np.ndarray, list[int]]:
    """log p [T, V] of every token, one row of the model at a time, in fp64 from its states; and all
    tokens. Windows are read by the class that a run reads them with."""
    folder = resolve(str(teacher), what="teacher")
    model = load_frozen(
        folder, read_checkpoint_manifest(folder), initialize(1, 1, 5.0), seq_length=MAX_LENGTH,
        dtype=torch.float32, head=VocabShard(size=VOCAB_SIZE, start=0, stop=VOCAB_SIZE),
        head_columns=VOCAB_SIZE,
    )  # fmt: skip
    eod = load_tokenizer(folder / "tokenizer").eod
    data = open_indexed(dataset)
    documents = [data[index].tolist() for index in range(len(data))]
    tokens = [token for document in documents for token in document]
    rows: list[list[int]] = []
    if window is None:
        for document in documents:
            inputs = [eod, *document[:-1]]
            rows += [inputs[at : at + MAX_LENGTH] for at in range(0, len(inputs), MAX_LENGTH)]
    else:
        whole = WindowDataset(
            data, np.arange(len(tokens) // window), window=window, seed=1, eod=eod,
            eod_mask_loss=False, tags=None, identity="",
        )  # fmt: skip
        rows = [whole[i]["tokens"].tolist() for i in np.argsort(whole.windows)]
        rows.append(tokens[window * len(rows) - 1 : -1])
    found = []
    for row in rows:
        hidden = model.forward(torch.tensor([row]))[0].double()
        assert model.head_WE is not None
        found.append((hidden @ model.head_WE.T.double()).log_softmax(dim=1).numpy())
    return np.concatenate(found), tokens


def stored_of(request: LogitsRequest) -> dict[str, np.ndarray]:
    manifest = verify_logits(request.output_prefix, request.data, hashes=True)
    stored = StoredLogits(request.output_prefix, manifest, top_k=None)
    found = stored.of_places(np.arange(manifest.origin.data.tokens))
    return {name.removeprefix("logits_"): value.numpy() for name, value in found.items()}


def test_what_is_stored_is_what_the_model_says(
    captured: dict[str, LogitsRequest], text: Path, even_teacher: Path
) -> None:
    dense, tokens = run_ranks(1, _dense, text, even_teacher, captured["top"].window)[0]
    order = np.argsort(-dense, axis=1, kind="stable")
    p = np.exp(dense)
    rows = np.arange(len(tokens))[:, None]
    for kind, request in captured.items():
        found = stored_of(request)
        precise = kind in ("top", "top_p", "sampled", "full")
        close = {"rtol": 2e-6, "atol": 2e-6} if precise else {"rtol": 6e-4, "atol": 1e-5}
        np.testing.assert_allclose(found["loss"], -dense[rows[:, 0], tokens], **close)
        np.testing.assert_allclose(found["entropy"], -(p * dense).sum(axis=1), **close)
        present = found["logp"] > -np.inf
        if kind == "sampled":
            continue
        if kind == "uint8":
            close = {"atol": 16 / 255, "rtol": 0.0}
        theirs = np.where(present, dense[rows, found["ids"]], -np.inf)
        np.testing.assert_allclose(found["logp"][present], theirs[present], **close)
        # Which tokens: but for equals, as far as rounding tells them apart.
        count = present.sum(axis=1)
        best = np.take_along_axis(dense, order, axis=1)[:, : present.shape[1]]
        np.testing.assert_allclose(theirs[present], best[present], rtol=0.0, atol=2e-6)
        outside = p.copy()
        for row in range(len(tokens)):
            assert len(set(found["ids"][row][: count[row]])) == count[row]
            outside[row, found["ids"][row][: count[row]]] = 0.0
        rest = outside.sum(axis=1)
        np.testing.assert_allclose(np.exp(found["rest"]), rest, rtol=1e-3, atol=1e-9)
        if kind == "top_p":
            before = np.cumsum(p[rows, order], axis=1) - p[rows, order]
            assert (np.minimum((before < TOP_P - 1e-6).sum(axis=1), 12) <= count).all()
            assert (np.minimum((before < TOP_P + 1e-6).sum(axis=1), 12) >= count).all()
            assert 1 < count.mean() < 12
        else:
            assert (count == (VOCAB_SIZE if kind == "full" else 12)).all()


def test_draws_are_of_the_models_distribution(
    captured: dict[str, LogitsRequest], text: Path, even_teacher: Path
) -> None:
    """Sums over all tokens: how often a token is drawn, against how often it should be."""
    dense = run_ranks(1, _dense, text, even_teacher, captured["top"].window)[0][0]
    found, p = stored_of(captured["sampled"]), np.exp(dense)
    counts = np.rint(np.exp(found["logp"].astype(np.float64)) * 20)
    assert (counts.sum(axis=1) == 20).all() and (np.diff(counts, axis=1) <= 0).all()
    drawn = np.bincount(found["ids"].ravel(), counts.ravel(), minlength=VOCAB_SIZE)
    spread = np.sqrt(20 * (p * (1 - p)).sum(axis=0))
    z = (drawn - 20 * p.sum(axis=0)) / spread
    assert np.abs(z).max() < 5 and 0.8 < z.std() < 1.2


def hashes(request: LogitsRequest) -> dict[str, str]:
    files = read_logits_manifest(request.output_prefix).files
    return {
        suffix: hashlib.sha256(Path(f"{request.output_prefix}{suffix}").read_bytes()).hexdigest()
        for suffix in (*files, ".logits.json")
    }


@pytest.mark.parametrize(("ranks", "rows"), [(1, 1), (2, 3)])
def test_files_do_not_depend_on_ranks_or_batch_size(
    captured: dict[str, LogitsRequest], tmp_path: Path, ranks: int, rows: int
) -> None:
    again = copies(captured, tmp_path, micro_batch_size=rows)
    run_ranks(ranks, _capture, again)
    for after in again:
        assert hashes(after) == hashes(captured[Path(after.output_prefix).name])


def test_draws_do_not_depend_on_shards_but_on_the_seed(
    captured: dict[str, LogitsRequest], tmp_path: Path
) -> None:
    made = captured["sampled"]
    other = dataclasses.replace(made, output_prefix=str(tmp_path / "other"), tokens_per_shard=300)
    seeded = dataclasses.replace(made, output_prefix=str(tmp_path / "seeded"), seed=1)
    run_ranks(1, _capture, [other, seeded])
    assert hashes(other) == hashes(made)
    assert (stored_of(seeded)["ids"] != stored_of(made)["ids"]).mean() > 0.3


def test_a_spread_teacher_says_the_same(captured: dict[str, LogitsRequest], tmp_path: Path) -> None:
    """Over two ranks, which rounds otherwise; two such teachers share the shards, bit for bit."""
    spread, twice = copies(captured, tmp_path / "tp2"), copies(captured, tmp_path / "tp2 dp2")
    run_ranks(2, _capture, spread, 2)
    run_ranks(4, _capture, twice, 2)
    for two, four in zip(spread, twice, strict=True):
        assert hashes(four) == hashes(two)
        found, expected = stored_of(two), stored_of(captured[Path(two.output_prefix).name])
        for name in ("entropy", "loss", "rest"):
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)
        same = (found["ids"] == expected["ids"]).all(axis=1)
        assert same.mean() > 0.995
        np.testing.assert_allclose(found["logp"][same], expected["logp"][same], atol=1e-5)


def _capture_and_die(request: LogitsRequest, after: int) -> None:
    save, written = shard_files.save_shard, 0

    def save_and_count(*arguments: Any) -> None:
        nonlocal written
        save(*arguments)
        written += 1
        if written == after:
            os.kill(os.getpid(), signal.SIGKILL)

    shard_files.save_shard = save_and_count
    _capture([request])


def _count_shards(request: LogitsRequest) -> int:
    shard, scored = LogitsScorer.shard, 0

    def counting(self: LogitsScorer, *arguments: Any) -> Any:
        nonlocal scored
        scored += 1
        return shard(self, *arguments)

    LogitsScorer.shard = counting  # type: ignore[method-assign]
    _capture([request])
    return scored


def test_killed_and_continued(text: Path, even_teacher: Path, tmp_path: Path) -> None:
    """On another number of ranks; other settings are refused meanwhile and afterwards; complete
    ones are left alone, damaged ones made anew."""
    whole = request_for(text, even_teacher, tmp_path / "whole", window=16)
    again = dataclasses.replace(whole, output_prefix=str(tmp_path / "again"))
    run_ranks(1, _capture, [whole])
    with pytest.raises(RankError, match="exit code -9"):
        run_ranks(1, _capture_and_die, again, 2)
    partial = tmp_path / "again.logits.partial"
    assert len(list(partial.glob("shard_*.npz"))) == 2 and not list(tmp_path.glob("again_*"))
    with pytest.raises(RankError, match=r"again\.logits\.partial holds shards.*settings\.top_k"):
        run_ranks(1, _capture, [dataclasses.replace(again, top_k=7)])
    origin = read_logits_manifest(whole.output_prefix).origin
    tokens = origin.data.tokens
    assert (origin.model.step, origin.planned_steps) == (8, 8)
    assert sum(run_ranks(2, _count_shards, again)) == -(-tokens // SHARD) - 2
    assert hashes(again) == hashes(whole) and not partial.exists()
    with pytest.raises(RankError, match=r"again\.logits\.json: there are logits .* settings\.seed"):
        run_ranks(1, _capture, [dataclasses.replace(again, kind="sampled", seed=3)])
    assert run_ranks(1, _count_shards, again) == [0]
    path = tmp_path / "again_count.bin"
    path.write_bytes(path.read_bytes()[:-1])
    assert run_ranks(1, _count_shards, again)[0] > 0
    assert hashes(again) == hashes(whole)


def _fails_to_write(request: LogitsRequest) -> None:
    def save(path: Path, *arguments: Any) -> None:
        raise OSError(28, "No space left on device", str(path))

    if os.environ["RANK"] == "0":
        shard_files.save_shard = save
    _capture([request], 2)


def test_ranks_that_share_a_teacher_end_together(
    text: Path, even_teacher: Path, tmp_path: Path
) -> None:
    """The one that writes has met an error; the other would wait for it in the next shard."""
    made = request_for(text, even_teacher, tmp_path / "some")
    with pytest.raises(RankError, match=r"No space left on device"):
        run_ranks(2, _fails_to_write, made)


def _of_transformers(data: str, folder: Path, window: int) -> np.ndarray:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stream = open_indexed(data)
    tokens = np.concatenate([stream[index] for index in range(len(stream))]).astype(np.int64)
    eod = load_tokenizer(folder).eod
    whole = len(tokens) // window
    inputs = np.concatenate([[eod], tokens])[: whole * window].reshape(whole, window)
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(inputs)).logits[..., :VOCAB_SIZE]
    return logits.double().log_softmax(dim=-1).flatten(0, 1).numpy()


def test_a_model_of_transformers(dataset: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from hf_models import make_hf_model, save_hf_model

    folder = save_hf_model(
        make_hf_model("phi"), tmp_path / "hf", dataset.parent / "tokenizer.model"
    )
    made = request_for(text, folder, tmp_path / "some", window=20, kind="full")
    made = dataclasses.replace(made, teacher=None, teacher_hf=str(folder))
    run_ranks(2, _capture, [made])
    expected = run_ranks(1, _of_transformers, made.data, folder, 20)[0]
    found = stored_of(made)
    logp = np.take_along_axis(expected, found["ids"][: len(expected)], axis=1)
    np.testing.assert_allclose(found["logp"][: len(expected)], logp, rtol=2e-5, atol=2e-5)
    assert read_logits_manifest(made.output_prefix).origin.planned_steps is None
    with pytest.raises(RankError, match="(?s)--tensor_parallel 2: .*are whole on each rank"):
        run_ranks(2, _capture, [dataclasses.replace(made, output_prefix="other")], 2)


def _online(config: RunConfig, deepspeed_config: str) -> tuple[dict[str, np.ndarray], str]:
    held_out = prepare(config, deepspeed_config).held_out
    assert held_out.teacher is not None
    return {k: v.numpy() for k, v in held_out.teacher.tensors.items()}, held_out.fingerprint


def held_out_of(request: LogitsRequest) -> tuple[dict[str, np.ndarray], str]:
    manifest = verify_logits(request.output_prefix, request.data, hashes=True)
    tensors, samples = load_teacher_scores(Path(f"{request.output_prefix}_held_out.safetensors"))
    assert manifest.held_out == samples
    return {name: value.numpy() for name, value in tensors.items()}, samples


def test_held_out_scores_are_those_of_a_run_with_the_teacher(
    dataset: Path, text: Path, even_teacher: Path, tmp_path: Path
) -> None:
    """Made with the logits, over one rank and spread; added to complete ones, and replaced."""
    config = make_config(
        dataset, tmp_path / "run", salt__kd_steps=3, salt__kd_weight=0.5,
        teacher__checkpoint=str(even_teacher), train__eval_samples=7, data__eod_mask_loss=True,
    )  # fmt: skip
    expected, samples = run_ranks(2, _online, config, make_deepspeed(tmp_path))[0]
    for name, values in (("run", config), ("less", dataclasses.replace(
        config, train=dataclasses.replace(config.train, eval_samples=4)))):  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(json.dumps(values.to_dict()))
    made = request_for(text, even_teacher, tmp_path / "some", window=16, micro_batch_size=2)
    with_scores = dataclasses.replace(made, held_out=str(tmp_path / "run.yaml"))
    run_ranks(2, _capture, [with_scores])
    found, same = held_out_of(made)
    assert same == samples and found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    logits = {k: v for k, v in hashes(made).items() if k.endswith(".bin")}
    fewer = dataclasses.replace(made, held_out=str(tmp_path / "less.yaml"))
    assert run_ranks(1, _count_shards, fewer) == [0]
    assert held_out_of(made)[0]["loss_NS"].shape == (4, 16)
    run_ranks(2, _capture, [with_scores], 2)
    np.testing.assert_allclose(held_out_of(made)[0]["loss_NS"], expected["loss_NS"], rtol=1e-5)
    assert {k: v for k, v in hashes(made).items() if k.endswith(".bin")} == logits
    # An unfinished exchange of scores leaves logits that are complete without any.
    manifest = read_logits_manifest(made.output_prefix)
    assert list(manifest.files)[-1] == "_held_out.safetensors"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 17}, "--window 17: .*trained on sequences of 16 tokens"),
        ({"top_k": 510}, "--top_k 510: must lie between 1 and the vocabulary of 509"),
        ({"top_p": 0.0}, "--top_p 0.0: must be above 0"),
        ({"kind": "sampled", "draws": 256}, "--draws 256: must lie between 1 and 255"),
        ({"seed": -1}, "--seed -1: must lie between 0"),
        ({"teacher": "nowhere"}, "--teacher = nowhere: does not exist"),
        ({"held_out": "nowhere.yaml"}, "nowhere.yaml"),
    ],
    ids=str,
)
def test_bad_arguments(
    text: Path, even_teacher: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    made = request_for(text, even_teacher, tmp_path / "some", window=16)
    with pytest.raises(RankError, match=message):
        run_ranks(1, _capture, [dataclasses.replace(made, **changes)])
    assert not list(tmp_path.iterdir()) or "held_out" in changes


def test_other_tokens_are_refused(
    dataset: Path, text: Path, even_teacher: Path, tmp_path: Path
) -> None:
    for path in text.parent.glob(f"{text.name}*"):
        target = tmp_path / path.name.replace(text.name, "other")
        (shutil.copytree if path.is_dir() else shutil.copy)(path, target)
    manifest = json.loads((tmp_path / "other.manifest.json").read_text(encoding="utf-8"))
    manifest["tokenizer_fingerprint"] = "another"
    (tmp_path / "other.manifest.json").write_text(json.dumps(manifest))
    made = request_for(tmp_path / "other", even_teacher, tmp_path / "some")
    with pytest.raises(RankError, match=r"other was made with a tokenizer of .*another"):
        run_ranks(1, _capture, [made])


def _as_launched(words: list[str]) -> None:
    sys.argv = words[1:]
    with contextlib.suppress(SystemExit):
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)


def test_command_line(
    text: Path, even_teacher: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["-m", "megatron_salt", "cache-logits", "--data", str(text), "--teacher",
             str(even_teacher), "--output-prefix", str(tmp_path / "some")]  # fmt: skip
    asked = ["--window", "16", "--kind", "sampled", "--draws", "9", "--tensor_parallel", "2"]
    run_ranks(2, _as_launched, [*words, *asked, "--tokens-per-shard", "9000"])
    printed = capfd.readouterr()
    assert "entries and" in printed.out and "tokens/s" in printed.err
    settings = read_logits_manifest(tmp_path / "some").origin.settings
    assert (settings.draws, settings.top_k, settings.context) == (9, 9, "window")
    failed = run_forked(*words, "--tensor_parallel", "0", folder=tmp_path)
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    assert failed.stderr.endswith("error: --tensor_parallel 0: must be at least 1\n")
