"""Training on tags: which sequences the KD phase reads, which tokens each route changes."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import RankError, run_ranks
from tiny import (
    SGD,
    cut_back,
    gradient_of_step,
    local_weights,
    make_config,
    make_deepspeed,
    metrics_of,
    run_and_kill,
    run_to_end,
    without_times,
)

from megatron_salt.config.fields import RunConfig
from megatron_salt.corpus.preprocess import preprocess
from megatron_salt.data.dataset import DataSource, find_tokenizer
from megatron_salt.data.order import rows_of_rank
from megatron_salt.data.selection import Rule, load_selection, read_table, write_table
from megatron_salt.data.tag_inputs import load_tag_inputs
from megatron_salt.data.tags import as_fp16, open_indexed, sequence_lengths
from megatron_salt.parallel.groups import initialize
from megatron_salt.planner.dry_run import describe_run
from megatron_salt.scoring.tagging import TagRequest, tag
from megatron_salt.training.run import prepare

VOCAB_SIZE = 509
LENGTH = 16


def _tag(request: TagRequest) -> None:
    tag(request, initialize(1, 1, 5.0))


@pytest.fixture(scope="module")
def tags(dataset: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with tags `documents` and `windows`, k = 40, a fifth of the sequences selected."""
    folder = tmp_path_factory.mktemp("tags")
    for name, window in (("documents", None), ("windows", LENGTH)):
        request = TagRequest(
            data=str(dataset), teacher=str(teacher), output_prefix=str(folder / name),
            window=window, top_k=40, store=("loss",), rule=Rule(fraction=0.2),
        )  # fmt: skip
        run_ranks(1, _tag, request)
    return folder


def tagged_config(dataset: Path, tags: Path, output: Path, kind: str, **settings: Any) -> RunConfig:
    return make_config(
        dataset, output, data__tags=[str(tags / kind)],
        salt__selection=[str(tags / f"{kind}_sequences.parquet")], **settings,
    )  # fmt: skip


def _read(config: RunConfig, cache: Path, num_samples: int, num_selected: int) -> dict[str, Any]:
    initialize(1, 1, 5.0)
    tokenizer = find_tokenizer(config.data)
    tag_inputs = load_tag_inputs(config, tokenizer)
    source = DataSource(
        config.data, tokenizer, num_samples=num_samples, seed=7, cache_path=cache,
        num_selected=num_selected, tag_inputs=tag_inputs, with_reference_loss=True,
    )  # fmt: skip
    selected, everything = source.read(range(num_selected), "kd"), source.read(range(num_samples))
    assert selected.tag_RS is not None and selected.reference_loss_RS is not None
    return {
        "selected": _arrays(selected), "all": _arrays(everything), "lines": source.epochs_needed(),
        "per_epoch": [part.samples_per_epoch for part in (source.selected_parts + source.parts)],
    }  # fmt: skip


def _arrays(batch: Any) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in vars(batch).items() if value is not None}


def tagged_tokens(dataset: Path, tags: Path, kind: str) -> dict[tuple[int, ...], Any]:
    """(5 tokens that end with it) -> (mask, loss) of every token, read with megatron-core alone.

    Five tokens name a place nearly always; those that name two are left out.
    """
    data, mask, loss = (
        open_indexed(path) for path in (dataset, f"{tags / kind}_mask", f"{tags / kind}_loss")
    )
    found: dict[tuple[int, ...], Any] = {}
    for index in range(len(data)):
        tokens, masks, losses = data[index].tolist(), mask[index], as_fp16(loss[index])
        for place in range(4, len(tokens)):
            key = tuple(tokens[place - 4 : place + 1])
            value = (float(masks[place]), float(losses[place]))
            found[key] = None if key in found and found[key] != value else value
    return found


@pytest.mark.parametrize("kind", ["documents", "windows"])
def test_tags_stand_where_their_token_is_the_label(
    dataset: Path, tags: Path, tmp_path: Path, kind: str
) -> None:
    config = tagged_config(dataset, tags, tmp_path / "run", kind, salt__kd_steps=1,
                           salt__kd_weight=0.0)  # fmt: skip
    result = run_ranks(1, _read, config, tmp_path / "cache", 300, 100)[0]
    known = tagged_tokens(dataset, tags, kind)
    for which, rows in (("selected", 100), ("all", 300)):
        batch = result[which]
        assert batch["tag_RS"].shape == (rows, LENGTH) == batch["tokens_RS"].shape
        compared = 0
        for row in range(rows):
            text = [*batch["tokens_RS"][row].tolist(), int(batch["labels_RS"][row, -1])]
            for place in range(4, LENGTH):
                expected = known.get(tuple(text[place - 3 : place + 2]))
                if expected is not None:
                    got = (batch["tag_RS"][row, place], batch["reference_loss_RS"][row, place])
                    assert got == expected
                    compared += 1
        assert compared > rows * LENGTH / 3
        assert 0.1 < batch["tag_RS"].mean() < 0.9


def stream_of(dataset: Path) -> list[int]:
    data = open_indexed(dataset)
    return [token for index in range(len(data)) for token in data[index].tolist()]


def test_selected_windows_are_read_as_they_were_scored(
    dataset: Path, tags: Path, tmp_path: Path
) -> None:
    config = tagged_config(dataset, tags, tmp_path / "run", "windows", salt__kd_steps=1,
                           salt__kd_weight=0.0)  # fmt: skip
    table = read_table(tags / "windows_sequences.parquet")
    tokens = stream_of(dataset)
    lengths = sequence_lengths(dataset)
    train_tokens = lengths[: round(0.9 * len(lengths))].sum()
    starts = table.columns["start"][table.columns["selected"]]
    expected = sorted(
        tuple(tokens[start : start + LENGTH]) for start in starts if start + LENGTH <= train_tokens
    )
    result = run_ranks(1, _read, config, tmp_path / "cache", 10, 2 * len(expected))[0]
    assert result["per_epoch"][0] == len(expected)
    labels = [tuple(row) for row in result["selected"]["labels_RS"].tolist()]
    assert sorted(labels[: len(expected)]) == expected  # every one once an epoch
    assert sorted(labels[len(expected) :]) == expected
    assert labels[: len(expected)] != labels[len(expected) :]
    inputs = result["selected"]["tokens_RS"]
    np.testing.assert_array_equal(inputs[:, 1:], result["selected"]["labels_RS"][:, :-1])
    assert "2.00 epochs" in result["lines"][0]


def test_windows_that_reach_into_the_held_out_part_are_not_read(
    dataset: Path, tags: Path, tmp_path: Path
) -> None:
    table = read_table(tags / "windows_sequences.parquet")
    every = table.with_selection(table.columns["score"], np.ones(len(table), dtype=bool), {})
    write_table(tmp_path / "every.parquet", every)
    config = tagged_config(
        dataset, tags, tmp_path / "run", "windows", salt__kd_steps=1, salt__kd_weight=0.0
    )
    salt = dataclasses.replace(config.salt, selection=[str(tmp_path / "every.parquet")])
    lengths = sequence_lengths(dataset)
    for split in ("90,10", "50,50", "31,69"):
        documents = round(float(split[:2]) / 100 * len(lengths))
        data = dataclasses.replace(config.data, split=split)
        result = run_ranks(
            1, _read, dataclasses.replace(config, salt=salt, data=data), tmp_path / "cache", 10, 10
        )[0]
        assert result["per_epoch"][0] == lengths[:documents].sum() // LENGTH


def test_blended_datasets_have_tags_and_selections_of_their_own(
    dataset: Path, teacher: Path, tags: Path, tmp_path: Path
) -> None:
    """Two datasets, one of the second's documents, each row's tags from its own dataset."""
    lines = (dataset.parent / "short.jsonl").read_text(encoding="utf-8").splitlines()[100:130]
    (tmp_path / "other.jsonl").write_text("\n".join(lines[::-1]), encoding="utf-8")
    preprocess([tmp_path / "other.jsonl"], tmp_path / "other", dataset.parent / "tokenizer.model",
               workers=1)  # fmt: skip
    other = tmp_path / "other_text_document"
    run_ranks(1, _tag, TagRequest(
        data=str(other), teacher=str(teacher), output_prefix=str(tmp_path / "windows"),
        window=LENGTH, top_k=40, store=("loss",), rule=Rule(kind="bottom", fraction=0.3),
    ))  # fmt: skip
    folders = (tags, tmp_path)
    config = make_config(
        dataset, tmp_path / "run", data__train_data_path=["0.7", str(dataset), "0.3", str(other)],
        data__tags=[str(folder / "windows") for folder in folders], salt__kd_steps=1,
        salt__kd_weight=0.0,
        salt__selection=[str(folder / "windows_sequences.parquet") for folder in folders],
    )  # fmt: skip
    batch = run_ranks(1, _read, config, tmp_path / "cache", 10, 100)[0]["selected"]
    rows_of = []
    for prefix, folder in zip((dataset, other), folders, strict=True):
        table, tokens = read_table(folder / "windows_sequences.parquet"), stream_of(prefix)
        mask, loss = (open_indexed(f"{folder / 'windows'}_{kind}") for kind in ("mask", "loss"))
        whole = {kind: np.concatenate([each[i] for i in range(len(each))])
                 for kind, each in (("mask", mask), ("loss", loss))}  # fmt: skip
        rows = {}
        for start in table.columns["start"][table.columns["selected"]]:
            place = slice(start, start + LENGTH)
            rows[tuple(tokens[place])] = whole["mask"][place], as_fp16(whole["loss"][place])
        rows_of.append(rows)
    counts = [0, 0]
    for row in range(100):
        labels = tuple(batch["labels_RS"][row].tolist())
        which = next(index for index, rows in enumerate(rows_of) if labels in rows)
        counts[which] += 1
        mask, loss = rows_of[which][labels]
        np.testing.assert_array_equal(batch["tag_RS"][row], mask)
        np.testing.assert_array_equal(batch["reference_loss_RS"][row], loss.astype(np.float32))
    assert counts == [70, 30]


def test_fingerprint_of_a_selection_knows_what_its_sequences_are(
    dataset: Path, tags: Path, tmp_path: Path
) -> None:
    """The same numbers mean other text as windows than as documents; a resume must notice."""
    found = []
    for kind in ("windows", "documents"):
        table = read_table(tags / f"{kind}_sequences.parquet")
        chosen = np.isin(table.columns["sequence"], [3, 5, 8])
        chosen_table = table.with_selection(table.columns["score"], chosen, {})
        write_table(tmp_path / "t.parquet", chosen_table)
        tokenizer = table.origin.tokenizer_fingerprint
        found.append(load_selection(tmp_path / "t.parquet", dataset, tokenizer))
    assert found[0].sequences.tolist() == found[1].sequences.tolist() == [3, 5, 8]
    assert found[0].fingerprint != found[1].fingerprint
    columns = {name: column[:-1] for name, column in table.columns.items()}
    write_table(tmp_path / "t.parquet", dataclasses.replace(table, columns=columns))
    with pytest.raises(ValueError, match=r"t\.parquet lists .* it is not whole"):
        load_selection(tmp_path / "t.parquet", dataset, tokenizer)


def test_selected_documents_make_up_the_rows(dataset: Path, tags: Path, tmp_path: Path) -> None:
    config = tagged_config(dataset, tags, tmp_path / "run", "documents", salt__kd_steps=1,
                           salt__kd_weight=0.0)  # fmt: skip
    table = read_table(tags / "documents_sequences.parquet")
    data = open_indexed(dataset)
    documents = [data[index].tolist() for index in range(len(data))]
    chosen = [
        documents[index]
        for index in np.flatnonzero(table.columns["selected"])
        if index < round(0.9 * len(documents))
    ]
    eod = documents[0][-1]
    rows = (sum(map(len, chosen)) - 1) // LENGTH
    result = run_ranks(1, _read, config, tmp_path / "cache", 10, rows)[0]
    assert result["per_epoch"][0] == rows
    pieces = {tuple(d[i : i + 4]) for d in chosen for i in range(len(d) - 3)}
    others = {tuple(d[i : i + 4]) for d in documents for i in range(len(d) - 3)} - pieces
    assert len(others) > len(pieces)
    for row in result["selected"]["tokens_RS"].tolist():
        for place in range(LENGTH - 3):
            piece = tuple(row[place : place + 4])
            assert piece in pieces or eod in piece


def test_unusable_selections_are_refused(dataset: Path, tags: Path, tmp_path: Path) -> None:
    config = tagged_config(dataset, tags, tmp_path / "run", "windows", salt__kd_steps=1,
                           salt__kd_weight=0.0)  # fmt: skip
    longer = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_length=32))
    with pytest.raises(RankError, match="selects windows of 16 tokens, data.seq_length is 32"):
        run_ranks(1, _read, longer, tmp_path / "cache", 10, 10)
    # The last document alone, which is held out: the others' scores depend on the text at hand.
    table, last = read_table(tags / "documents_sequences.parquet"), tmp_path / "last.parquet"
    alone = np.arange(len(table)) == len(table) - 1
    write_table(last, table.with_selection(table.columns["score"], alone, table.rule))
    documents = dataclasses.replace(
        config, salt=dataclasses.replace(config.salt, selection=[str(last)]),
        data=dataclasses.replace(config.data, tags=[]),
    )  # fmt: skip
    with pytest.raises(RankError, match=r"do not fill one sample of data\.seq_length = 16"):
        run_ranks(1, _read, documents, tmp_path / "cache", 10, 10)


# -- the switch, resumed ---------------------------------------------------------------------------

KD_STEPS = 4
TP2_PP2: dict[str, Any] = {
    "parallel__tensor_model_parallel_size": 2,
    "parallel__pipeline_model_parallel_size": 2,
    "parallel__sequence_parallel": True,
    "salt__kd_steps": KD_STEPS,
    "salt__kd_tokens": "low_entropy",
    "salt__kd_token_share": 0.5,
    "salt__ce_tokens": "excess_loss",
    "salt__ce_token_share": 0.7,
    "train__steps": 7,
    "train__checkpoint_interval": 1,
    "train__keep_checkpoints": 0,
}


def _train(config: RunConfig, deepspeed_config: str) -> dict[str, np.ndarray]:
    return local_weights(run_to_end(config, deepspeed_config))


@pytest.mark.parametrize("kind", ["documents", "windows"])
def test_resumed_around_the_switch_of_data(
    dataset: Path, teacher: Path, tags: Path, tmp_path: Path, kind: str
) -> None:
    """tp 2, pp 2: resumed two steps before the switch, at it and after it; all bit-equal.

    With windows some rows are prefix language modelling, drawn apart in each order of rows.
    """
    settings = {**TP2_PP2, "teacher__checkpoint": str(teacher)}
    if kind == "windows":
        settings["data__objective"] = [0.5, "causal", 0.5, "prefix"]
    deepspeed_config = make_deepspeed(tmp_path, zero_optimization={"stage": 1}, train_batch_size=4)
    whole = tagged_config(dataset, tags, tmp_path / "whole", kind, **settings)
    expected = run_ranks(4, _train, whole, deepspeed_config)
    records = without_times(metrics_of(tmp_path / "whole"))
    for record in records[1:]:
        in_kd = record["step"] <= KD_STEPS
        # Shares are rounded up in each sequence, and prefix rows have few counted tokens.
        assert record["taught_share"] == pytest.approx(0.5 * in_kd, abs=0.07)
        assert record["ce_share"] == pytest.approx(0.75 if in_kd else 1.0, abs=0.07)
    for resume_at in (KD_STEPS - 2, KD_STEPS, KD_STEPS + 1):
        config = tagged_config(dataset, tags, tmp_path / f"run{resume_at}", kind, **settings)
        cut_back(tmp_path / "whole", tmp_path / f"run{resume_at}", resume_at)
        weights = run_ranks(4, _train, config, deepspeed_config)
        for mine, theirs in zip(weights, expected, strict=True):
            for name, weight in theirs.items():
                np.testing.assert_array_equal(mine[name], weight, err_msg=name)
        assert without_times(metrics_of(tmp_path / f"run{resume_at}")) == records


def _tokens_of_steps(config: RunConfig, deepspeed_config: str) -> list[np.ndarray]:
    """The tokens that the run's own steps read."""
    run = prepare(config, deepspeed_config)
    seen: list[np.ndarray] = []
    make = run.student.micro_batches

    def spy(batch: Any, *arguments: Any) -> Any:
        seen.append(batch.tokens_RS.numpy().copy())
        return make(batch, *arguments)

    run.student.micro_batches = spy  # type: ignore[method-assign]
    for step in range(config.train.steps):
        run.step(step)
    return seen


def test_lm_phase_reads_what_a_run_without_selection_reads(
    dataset: Path, tags: Path, tmp_path: Path
) -> None:
    """Selection without KD, so without a teacher: only the KD phase differs from a plain run."""
    deepspeed_config = make_deepspeed(tmp_path)
    selecting = make_config(
        dataset, tmp_path / "selecting", salt__kd_steps=2, salt__kd_weight=0.0,
        salt__selection=[str(tags / "windows_sequences.parquet")],
    )  # fmt: skip
    mine = run_ranks(1, _tokens_of_steps, selecting, deepspeed_config)[0]
    plain = make_config(dataset, tmp_path / "plain")
    theirs = run_ranks(1, _tokens_of_steps, plain, deepspeed_config)[0]
    table = read_table(tags / "windows_sequences.parquet")
    tokens = stream_of(dataset)
    starts = table.columns["start"][table.columns["selected"]]
    selected = {tuple(tokens[start - 1 : start + LENGTH - 1]) for start in starts}
    for step in range(5):
        rows = {tuple(row) for row in mine[step].tolist()}
        if step < 2:
            assert rows <= selected
        else:
            np.testing.assert_array_equal(mine[step], theirs[step])
            assert not rows <= selected
    assert [r["phase"] for r in metrics_of(tmp_path / "selecting")[1:]] == ["kd"] * 2 + ["lm"] * 3


def test_other_tags_or_selection_at_a_resume(
    dataset: Path, teacher: Path, tags: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "teacher__checkpoint": str(teacher), "salt__kd_steps": 3, "salt__kd_tokens": "tagged",
        "train__steps": 4, "train__checkpoint_interval": 1, "train__keep_checkpoints": 0,
    }  # fmt: skip
    deepspeed_config = make_deepspeed(tmp_path)
    config = tagged_config(dataset, tags, tmp_path / "run", "documents", **settings)
    with pytest.raises(RankError, match="exit code -9"):
        run_ranks(1, run_and_kill, config, deepspeed_config, 2)
    other = tagged_config(dataset, tags, tmp_path / "run", "windows", **settings)
    with pytest.raises(RankError, match=r"data\.tags: the KD phase of this run began with"):
        run_ranks(1, _train, other, deepspeed_config)
    none = dataclasses.replace(config, salt=dataclasses.replace(config.salt, selection=[]))
    with pytest.raises(RankError, match=r"salt\.selection: the KD phase of this run began with"):
        run_ranks(1, _train, none, deepspeed_config)
    run_ranks(1, _train, config, deepspeed_config)
    # The KD phase is over: a longer run needs neither.
    longer = make_config(
        dataset, tmp_path / "run", **{**settings, "train__steps": 5, "salt__kd_tokens": "all"}
    )
    run_ranks(1, _train, longer, deepspeed_config)


def _thirty_steps(config: RunConfig, deepspeed_config: str) -> bool:
    """Whether the first rows, and the tensors that were handed out for them, are as at first."""
    run = prepare(config, deepspeed_config)
    first = run.data.read(range(8), "kd")
    before = _arrays(first)
    before = {name: value.copy() for name, value in before.items()}
    for step in range(config.train.steps):
        run.step(step)
    again = _arrays(run.data.read(range(8), "kd"))
    held = _arrays(first)
    return all(
        np.array_equal(again[name], value) and np.array_equal(held[name], value)
        for name, value in before.items()
    )


def test_masks_are_never_changed_in_place(
    dataset: Path, teacher: Path, tags: Path, tmp_path: Path
) -> None:
    config = tagged_config(
        dataset, tags, tmp_path / "run", "windows", teacher__checkpoint=str(teacher),
        salt__kd_steps=20, salt__kd_tokens="tagged", salt__ce_tokens="untagged",
        train__steps=30, train__eval_samples=2,
    )  # fmt: skip
    assert run_ranks(1, _thirty_steps, config, make_deepspeed(tmp_path)) == [True]
    records = metrics_of(tmp_path / "run")
    assert all(0.05 < record["taught_share"] < 0.95 for record in records[1:21])
    assert all(record["taught_share"] + record["ce_share"] == pytest.approx(1.0)
               for record in records[1:21])  # fmt: skip
    # The LM phase is plain training: no route acts there.
    assert {(r["taught_share"], r["ce_share"]) for r in records[21:]} == {(0.0, 1.0)}


# -- routes ----------------------------------------------------------------------------------------

W = 0.6
ROUTES: dict[str, dict[str, Any]] = {
    "everything": {},
    "kd tagged": {"kd_tokens": "tagged"},
    "kd untagged, mixed": {"kd_tokens": "untagged", "untaught_ce": "mixed"},
    "kd low entropy": {"kd_tokens": "low_entropy", "kd_token_share": 0.3},
    "kd high entropy": {"kd_tokens": "high_entropy", "kd_token_share": 0.3, "untaught_ce": "mixed"},
    "kd teacher better": {"kd_tokens": "teacher_better"},
    "ce tagged": {"ce_tokens": "tagged"},
    "ce untagged": {"ce_tokens": "untagged"},
    "ce excess loss": {"ce_tokens": "excess_loss", "ce_token_share": 0.4},
    "both": {"kd_tokens": "teacher_better", "ce_tokens": "excess_loss", "ce_token_share": 0.4},
    "ce excess loss of the tags": {"ce_tokens": "excess_loss", "ce_token_share": 0.4,
                                   "kd_weight": 0.0},
}  # fmt: skip


def _capture_weights(config: RunConfig, deepspeed_config: str) -> dict[str, Any]:
    """One step: the weights that the loss got, and the student's gradient by its logits' rows.

    Besides, everything by which the test decides for itself: losses and entropies of each token,
    from whole logits in plain PyTorch at tp 1.
    """
    from unittest import mock

    from megatron_salt.model import loss as loss_module

    run = prepare(config, deepspeed_config)
    read = run.data.read

    def read_with_gaps(*arguments: Any) -> Any:
        batch = read(*arguments)
        return dataclasses.replace(batch, mask_RS=(batch.tokens_RS % 5 != 0).float())

    run.data.read = read_with_gaps  # type: ignore[method-assign]
    calls: list[dict[str, Any]] = []
    original = loss_module.linear_kd_loss

    def spy(
        hidden: Any, head: Any, teacher: Any, teacher_head: Any, labels: Any, **kwargs: Any
    ) -> Any:
        calls.append({
            "hidden": hidden.detach().numpy().copy(), "head": head.detach().numpy().copy(),
            "teacher": None if teacher is None else teacher.numpy().copy(),
            "teacher_head": None if teacher is None else teacher_head.numpy().copy(),
            "labels": labels.numpy().copy(), "ce": kwargs["ce_weight_T"].numpy().copy(),
            "kd": kwargs["kd_weight_T"].numpy().copy(),
        })  # fmt: skip
        return original(hidden, head, teacher, teacher_head, labels, **kwargs)

    with mock.patch.object(loss_module, "linear_kd_loss", spy):
        run.step(0)
    groups = run.groups
    rows = rows_of_rank(0, 8, groups.dp_rank, groups.layout.dp_size)
    batch = run.data.read(rows, "kd")
    weights = local_weights(run)
    return {"calls": calls, "batch": _arrays(batch), "weights": weights}


def capture(
    dataset: Path, teacher: Path, tags: Path, folder: Path, route: dict[str, Any], tp: int, pp: int,
    micro_batch_size: int = 2,
) -> tuple[list[dict[str, Any]], RunConfig]:  # fmt: skip
    folder.mkdir(exist_ok=True)
    settings = {f"salt__{name}": value for name, value in {"kd_weight": W, **route}.items()}
    if route.get("kd_weight") != 0.0:
        settings["teacher__checkpoint"] = str(teacher)
    config = make_config(
        dataset, folder / "run", data__tags=[str(tags / "documents")], train__steps=1,
        salt__kd_steps=1,
        parallel__tensor_model_parallel_size=tp, parallel__pipeline_model_parallel_size=pp,
        parallel__sequence_parallel=tp > 1, **settings,
    )  # fmt: skip
    json = make_deepspeed(folder, optimizer=SGD, train_micro_batch_size_per_gpu=micro_batch_size)
    return run_ranks(tp * pp, _capture_weights, config, json), config


def best(values: np.ndarray, places: list[int], share: float) -> set[int]:
    """The share of the places with the largest values."""
    count = int(np.ceil(len(places) * share - 1e-9))
    return set(sorted(places, key=lambda place: (-values[place], place))[:count])


def expected_weights(call: dict[str, Any], batch: dict[str, Any], rows: slice, total: float,
                     route: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """[B, S] weights by hand, token by token, from whole logits in fp64."""

    def scores(hidden: np.ndarray, head: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits = torch.from_numpy(hidden).double() @ torch.from_numpy(head[:VOCAB_SIZE]).double().T
        log_p = logits.log_softmax(dim=1)
        ce = -log_p.gather(1, torch.from_numpy(call["labels"])[:, None])[:, 0]
        entropy = -(log_p.exp() * log_p).sum(dim=1)
        shape = (LENGTH, -1)
        return ce.view(shape).T.numpy(), entropy.view(shape).T.numpy()

    mask, tag = batch["mask_RS"][rows], batch["tag_RS"][rows]
    student_ce, _ = scores(call["hidden"], call["head"])
    if call["teacher"] is not None:
        teacher_ce, entropy = scores(call["teacher"], call["teacher_head"])
    else:
        teacher_ce = entropy = batch["reference_loss_RS"][rows].astype(np.float64)
    weight = route.get("kd_weight", W)
    ce, kd = np.zeros(mask.shape), np.zeros(mask.shape)
    for row in range(len(mask)):
        places = [place for place in range(LENGTH) if mask[row, place]]

        taught = set(places)
        match route.get("kd_tokens", "all"):
            case "tagged":
                taught = {place for place in places if tag[row, place]}
            case "untagged":
                taught = {place for place in places if not tag[row, place]}
            case "low_entropy":
                taught = best(-entropy[row], places, route["kd_token_share"])
            case "high_entropy":
                taught = best(entropy[row], places, route["kd_token_share"])
            case "teacher_better":
                taught = {p for p in places if teacher_ce[row, p] < student_ce[row, p]}
        counted = set(places)
        match route.get("ce_tokens", "all"):
            case "tagged":
                counted = {place for place in places if tag[row, place]}
            case "untagged":
                counted = {place for place in places if not tag[row, place]}
            case "excess_loss":
                counted = best((student_ce - teacher_ce)[row], places, route["ce_token_share"])
        for place in places:
            whole = place not in taught and route.get("untaught_ce", "full") == "full"
            ce[row, place] = (1.0 if whole else 1.0 - weight) * (place in counted) / total
            kd[row, place] = weight * (place in taught) / total
    return ce, kd


@pytest.fixture(scope="module")
def plain_gradient(
    dataset: Path, teacher: Path, tags: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, np.ndarray]:
    """Of the step without any route, which every route must change."""
    folder = tmp_path_factory.mktemp("plain")
    return _gradient(*capture(dataset, teacher, tags, folder, {}, tp=1, pp=1))


@pytest.mark.parametrize("name", ROUTES)
def test_route_weighs_exactly_the_tokens_that_it_should(
    dataset: Path,
    teacher: Path,
    tags: Path,
    plain_gradient: dict[str, np.ndarray],
    tmp_path: Path,
    name: str,
) -> None:
    """At tp 1 against weights made by hand; at tp 2, pp 2 the same weights and gradient."""
    route = ROUTES[name]
    results, config = capture(dataset, teacher, tags, tmp_path, route, tp=1, pp=1)
    batch, calls = results[0]["batch"], results[0]["calls"]
    total = batch["mask_RS"].sum()
    assert total < batch["mask_RS"].size  # some tokens do not count
    weights = []
    for index, call in enumerate(calls):
        rows = slice(2 * index, 2 * index + 2)
        ce, kd = expected_weights(call, batch, rows, total, route)
        got_ce, got_kd = (call[key].reshape(LENGTH, 2).T / len(calls) for key in ("ce", "kd"))
        np.testing.assert_allclose(got_ce, ce, rtol=1e-5, atol=0)
        np.testing.assert_allclose(got_kd, kd, rtol=1e-5, atol=0)
        weights.append((got_ce, got_kd))
    gradient = _gradient(results, config)
    if name != "everything":
        assert any(
            np.linalg.norm(gradient[key] - value) > 1e-3 * np.linalg.norm(value)
            for key, value in plain_gradient.items()
        )
    # Shares are of whole sequences, of which a rank has a part at tp 2.
    for tp, pp in ((2, 1), (2, 2)) if "token_share" in str(route) else ((2, 2),):
        folder = tmp_path / f"tp{tp}pp{pp}"
        others, config = capture(dataset, teacher, tags, folder, route, tp=tp, pp=pp)
        last_stage = others[-tp:]
        for result in last_stage:
            for call, (ce, kd) in zip(result["calls"], weights, strict=True):
                got = [call[key].reshape(LENGTH, 2).T / len(weights) for key in ("ce", "kd")]
                np.testing.assert_allclose(got[0], ce, rtol=1e-6)
                np.testing.assert_allclose(got[1], kd, rtol=1e-6)
        for key, value in _gradient(others, config).items():
            error = np.linalg.norm(value - gradient[key]) / np.linalg.norm(gradient[key])
            assert error < 1e-5, f"{key}: relative gradient error {error:.2e}"


def _gradient(results: list[dict[str, Any]], config: RunConfig) -> dict[str, np.ndarray]:
    return gradient_of_step([result["weights"] for result in results], config, VOCAB_SIZE)


def test_a_teacher_that_is_no_better_does_not_teach(dataset: Path, tmp_path: Path) -> None:
    """Student and teacher of equal weights: equal losses, so no token is taught."""
    still = make_deepspeed(tmp_path, optimizer={"type": "SGD", "params": {"lr": 0.0}})
    run_ranks(1, _train, make_config(dataset, tmp_path / "teacher", train__steps=1), still)
    config = make_config(
        dataset, tmp_path / "student", train__steps=1, salt__kd_steps=1,
        salt__kd_tokens="teacher_better", teacher__checkpoint=str(tmp_path / "teacher"),
    )  # fmt: skip
    run_ranks(1, _train, config, still)
    assert metrics_of(tmp_path / "student")[1]["taught_share"] == 0.0


@pytest.mark.parametrize("name", ["kd low entropy", "both"])
def test_routes_do_not_depend_on_the_cut(
    dataset: Path, teacher: Path, tags: Path, tmp_path: Path, name: str
) -> None:
    """Shares are of a sequence, so micro-batches of 8 rows and of 1 row give one gradient."""
    whole = capture(dataset, teacher, tags, tmp_path / "8", ROUTES[name], 1, 1, 8)
    single = capture(dataset, teacher, tags, tmp_path / "1", ROUTES[name], 1, 1, 1)
    expected = _gradient(*whole)
    for key, value in _gradient(*single).items():
        error = np.linalg.norm(value - expected[key]) / np.linalg.norm(expected[key])
        assert error < 1e-5, f"{key}: relative gradient error {error:.2e}"


def test_tags_without_losses_serve_no_excess_loss(
    dataset: Path, tags: Path, tmp_path: Path, teacher: Path
) -> None:
    request = TagRequest(
        data=str(dataset), teacher=str(teacher), output_prefix=str(tmp_path / "bare"), top_k=40
    )
    run_ranks(1, _tag, request)
    config = make_config(
        dataset, tmp_path / "run", data__tags=[str(tmp_path / "bare")], salt__kd_steps=1,
        salt__kd_weight=0.0, salt__ce_tokens="excess_loss", salt__ce_token_share=0.5,
    )  # fmt: skip
    with pytest.raises(RankError, match="tag with --store loss"):
        run_ranks(1, _train, config, make_deepspeed(tmp_path))
    # A teacher in memory computes its own losses.
    taught = make_config(
        dataset, tmp_path / "run", data__tags=[str(tmp_path / "bare")], salt__kd_steps=1,
        salt__ce_tokens="excess_loss", salt__ce_token_share=0.5, train__steps=1,
        teacher__checkpoint=str(teacher),
    )  # fmt: skip
    run_ranks(1, _train, taught, make_deepspeed(tmp_path))
    swapped = tmp_path / "swapped"
    for path in tags.glob("documents*"):
        shutil.copy(path, f"{swapped}{path.name.removeprefix('documents')}")
    shutil.copy(f"{tags / 'windows'}_mask.bin", f"{swapped}_mask.bin")
    config = make_config(
        dataset, tmp_path / "run", data__tags=[str(swapped)], salt__kd_steps=1, salt__kd_weight=0.0
    )
    with pytest.raises(RankError, match=r"swapped_mask\.bin is not the file"):
        run_ranks(1, _train, config, make_deepspeed(tmp_path))


def test_dry_run_says_how_many_epochs_the_selection_makes(
    dataset: Path, tags: Path, tmp_path: Path
) -> None:
    config = tagged_config(
        dataset, tags, tmp_path / "run", "windows", salt__kd_steps=4, salt__kd_weight=0.0
    )
    text = describe_run(config, make_deepspeed(tmp_path))
    table = read_table(tags / "windows_sequences.parquet")
    selected = table.columns["selected"]
    tokens = int(table.columns["tokens"][selected].sum())
    epochs = 4 * 8 * LENGTH / tokens
    assert f"KD phase: {selected.sum():,} selected sequences of {tokens:,} tokens" in text
    assert f"about {epochs:.2f} epochs" in text
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
