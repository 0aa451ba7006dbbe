"""Models whose vocabulary is larger than the data's: rows beyond it have no probability anywhere.

The rows that are appended outweigh all others, so one that is not cut off changes every number.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from larger_vocabulary import add_tokens, enlarged
from ranks import run_ranks
from tiny import make_config, make_deepspeed, metrics_of, run_to_end, without_times

from megatron_salt.data.manifest import dataset_manifest_path
from megatron_salt.data.tokenizer import load_tokenizer
from megatron_salt.evaluation.checkpoint_score import ScoreRequest, score_checkpoint
from megatron_salt.generation.continuation import continuer
from megatron_salt.generation.sampling import GenerationRequest
from megatron_salt.parallel.groups import initialize
from megatron_salt.scoring.request import TagRequest
from megatron_salt.scoring.tagging import tag

VOCAB_SIZE = 509


def _train(*arguments: Any) -> None:
    run_to_end(*arguments)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_teacher_with_more_rows_teaches_the_same(
    dataset: Path, teacher: Path, tmp_path: Path, tp: int, pp: int, tied: bool
) -> None:
    """Bit for bit: 8 more tokens, and 3 rows that are no token's."""
    found = []
    for name, tokens, rows in (("cut", 0, 0), ("larger", 8, 11)):
        path = enlarged(teacher, tmp_path / name, tokens=tokens, rows=rows, tied=tied)
        config = make_config(
            dataset, tmp_path / f"{name} run", teacher__checkpoint=str(path), salt__kd_steps=2,
            train__steps=3, train__eval_interval=1, parallel__tensor_model_parallel_size=tp,
            parallel__pipeline_model_parallel_size=pp,
        )  # fmt: skip
        run_ranks(tp * pp, _train, config, make_deepspeed(tmp_path))
        found.append(without_times(metrics_of(tmp_path / f"{name} run")))
    assert found[0][1]["phase"] == "kd" and found[0][1]["kl_nats"] > 0
    assert found[0] == found[1]


def _scores(paths: list[Path], dataset: Path) -> list[dict[str, Any]]:
    groups = initialize(1, 1, 5.0)
    request = ScoreRequest(
        data=[str(dataset)], split=None, samples=64, seq_length=None, micro_batch_size=4,
        precision=None,
    )  # fmt: skip
    found = [score_checkpoint(str(path), request, groups) for path in paths]
    return [{k: v for k, v in scores.items() if k != "checkpoint"} for scores in found]


def test_evaluate_gives_no_probability_beyond_the_data(
    dataset: Path, teacher: Path, tmp_path: Path
) -> None:
    """Nor beyond the model's own tokens, of data that have these."""
    paths = [
        enlarged(teacher, tmp_path / f"{tokens} {rows}", tokens=tokens, rows=rows)
        for tokens, rows in ((0, 0), (0, 3), (8, 11), (8, 8))
    ]
    (found,) = run_ranks(1, _scores, paths, dataset)
    assert found == [found[0]] * 4
    of_more = tmp_path / "data_text_document"
    for path in dataset.parent.glob(f"{dataset.name}.*"):
        copy = shutil.copytree if path.is_dir() else shutil.copyfile
        copy(path, f"{of_more}{path.name.removeprefix(dataset.name)}")
    add_tokens(Path(f"{of_more}.tokenizer", "tokenizer.model"), 8)
    manifest = json.loads(dataset_manifest_path(of_more).read_text())
    manifest["tokenizer_fingerprint"] = load_tokenizer(f"{of_more}.tokenizer").fingerprint
    dataset_manifest_path(of_more).write_text(json.dumps(manifest))
    (of_all,) = run_ranks(1, _scores, paths[2:], of_more)
    assert of_all[0] == of_all[1]
    assert of_all[0]["valid_ce_nats"] > found[0]["valid_ce_nats"] + 1


def _tag(request: TagRequest) -> None:
    tag(request, initialize(1, 1, 5.0))


def test_tags_are_of_the_datas_tokens(dataset: Path, teacher: Path, tmp_path: Path) -> None:
    contents = []
    for tokens, rows in ((0, 0), (8, 11)):
        path = enlarged(teacher, tmp_path / str(rows), tokens=tokens, rows=rows)
        output = tmp_path / f"{rows} tags"
        request = TagRequest(
            data=str(dataset), teacher=str(path), output_prefix=str(output),
            store=("loss", "entropy"),
        )  # fmt: skip
        run_ranks(1, _tag, request)
        names = ("mask", "loss", "entropy")
        contents.append([Path(f"{output}_{name}.bin").read_bytes() for name in names])
    assert contents[0] == contents[1]


def _texts(paths: list[Path], greedy: bool) -> list[list[int]]:
    groups = initialize(1, 1, 1.0)
    asked = GenerationRequest(
        prompts=["def f", "import"], max_new_tokens=8, greedy=greedy, temperature=1.0, top_k=0,
        top_p=1.0, seed=1, precision=None,
    )  # fmt: skip
    found = [continuer(str(path), asked, lambda line: None)(groups) for path in paths]
    return [[record["tokens"] for record in records] for records in found]


@pytest.mark.parametrize("greedy", [True, False])
def test_generate_writes_the_tokenizers_tokens_only(
    teacher: Path, tmp_path: Path, greedy: bool
) -> None:
    paths = [enlarged(teacher, tmp_path / str(rows), rows=rows) for rows in (0, 11)]
    paths.append(enlarged(teacher, tmp_path / "tokens", tokens=8, rows=11))
    ((cut, larger, own),) = run_ranks(1, _texts, paths, greedy)
    assert cut == larger
    assert max(token for tokens in own for token in tokens) in range(VOCAB_SIZE, VOCAB_SIZE + 8)
