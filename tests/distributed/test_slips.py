"""Slips of the hand, each in a command that is right but for it: one message that names the file or
setting, the value and the remedy, status 2, and no wait."""

from __future__ import annotations

import json
import resource
import shlex
import shutil
from pathlib import Path

import pytest
from commands import run_forked
from edited import edit_manifest
from small_datasets import write_dataset
from tiny import make_deepspeed
from tiny_tags import write_scores, write_tags

from megatron_salt.checkpoint.folder import list_checkpoints
from megatron_salt.corpus.train_tokenizer import train_tokenizer

TRAIN = "pretrain --config {place}/run.yaml --deepspeed_config {place}/ds.json "
TAUGHT = TRAIN + "--teacher.checkpoint {place}/run "
AGAIN = TRAIN + "--train.output_dir {place}/run --train.steps 9 "
TEXT = "--tokenizer {data}.tokenizer --output-prefix {place}/new"
TAG = "tag --data {data} --teacher {place}/run --output-prefix {place}/new "
SELECT = "select --output-prefix {place}/new "

# A command, and what its message must say.
SLIPS = [
    # Names and values of settings.
    (TRAIN + "--model.hiden_size 3", "--model.hiden_size", "Did you mean 'model.hidden_size'?"),
    (TRAIN + "--train.lr 1e-3", "--train.lr", "optimizer.params.lr in the DeepSpeed JSON"),
    (TRAIN + "--batch_size 4", "--batch_size", "train_batch_size in the DeepSpeed JSON"),
    (TRAIN + "--train.bf16 true", "--train.bf16", "bf16.enabled in the DeepSpeed JSON"),
    (TRAIN + "--train.weight_decay 0.1", "--train.weight_decay", "optimizer.params.weight_decay"),
    (TRAIN + "--train.zero 1", "--train.zero", "zero_optimization.stage in the DeepSpeed JSON"),
    (TRAIN + "--config {place}/lr.yaml", "lr.yaml", "'train.lr'", "optimizer.params.lr"),
    (TRAIN + "--config {place}/batch.yaml", "batch.yaml", "train_batch_size", "DeepSpeed JSON"),
    (TRAIN + "--config {place}/bf16.yaml", "bf16.yaml", "--deepspeed_config"),
    (TRAIN + "--config {place}/decay.yaml", "decay.yaml", "optimizer.params.weight_decay"),
    (TRAIN + "--config {place}/zero.yaml", "zero.yaml", "'zero'", "zero_optimization.stage"),
    (TRAIN + "--config {place}/syntax.yaml", "syntax.yaml:3:1", "not valid YAML"),
    (TRAIN + "--config {place}/none.yaml", "--config", "none.yaml", "No such file"),
    ("pretrain --config {place}/ds.json --deepspeed_config {place}/run.yaml", "ds.json",
     "DeepSpeed's JSON", "give that file as --deepspeed_config"),
    ("pretrain --config {place}/run.yaml", "--deepspeed_config is missing"),
    (TRAIN + "--model.rope_scaling 8", "model.rope_scaling = 8", "expected numbers by name"),
    (TRAIN + "--train.steps 1e3x", "train.steps = 1e3x", "expected whole number"),
    (TAUGHT + "--salt.kd_steps 10", "salt.kd_steps = 10", "between 0 and train.steps = 8"),
    (TRAIN + "--data.train_data_path {data}", "data.train_data_path = {data}", 'as "[{data}]"'),
    (TRAIN + "--salt.kd_weight 1.5", "salt.kd_weight = 1.5", "in [0, 1]"),
    (TRAIN + "--data.split 95", "data.split = '95'", "as in 99,1"),
    (TRAIN + "--data.split 100,0", "data.split = '100,0'", "data.valid_data_path"),
    (TRAIN + "--data.tags [a] --data.tags [b]", "--data.tags is given twice", "--data.tags+"),
    (TRAIN + "--parallel.tensor_model_parallel_size 2", "model.num_query_groups = 1",
     "tensor_model_parallel_size = 2", "change one of them"),
    (TRAIN + "--parallel.tensor_model_parallel_size 2 --model.num_query_groups 2",
     "world size 1", "tensor_model_parallel_size = 2", "ranks"),
    # Teacher, switch, tags and selections of a run.
    (TRAIN + "--salt.kd_steps 2", "salt.kd_steps = 2", "name the teacher's checkpoint"),
    (TAUGHT, "teacher.checkpoint = {place}/run", "salt.kd_steps is 0", "set salt.kd_steps"),
    (TRAIN + "--teacher.checkpoint {place}/nowhere --salt.kd_steps 2", "{place}/nowhere",
     "does not exist", "give a directory with"),
    (TAUGHT + "--salt.kd_steps 2 --data.seq_length 32", "{place}/run", "data.seq_length is 32",
     "shorten"),
    (TRAIN + "--teacher.checkpoint {place}/other --salt.kd_steps 2", "{place}/other",
     "330 tokens", "509 tokens",
     "take another teacher"),
    (TAUGHT + "--salt.kd_steps 2 --salt.switch adaptive", "train.eval_interval is 0", "set it"),
    (TAUGHT + "--salt.kd_steps 2 --salt.kd_tokens low_entropy", "salt.kd_token_share", "below 1"),
    (TAUGHT + "--salt.kd_steps 2 --salt.kd_tokens tagged", "salt.kd_tokens = tagged",
     "needs data.tags"),
    (TAUGHT + '--salt.kd_steps 2 --data.train_data_path "[1, {data}, 1, {place}/short]" '
     "--data.tags [{place}/tags]", "data.tags names 1", "2 datasets", "one for each"),
    (TAUGHT + "--salt.kd_steps 2 --salt.selection [{place}/window_sequences.parquet]",
     "window_sequences.parquet", "windows of 8", "data.seq_length is 16", "make the two equal"),
    (TAUGHT + "--salt.kd_steps 2 --salt.kd_tokens tagged --data.tags [{place}/tags.tags.json]",
     "tags.tags.json is a file", "give {place}/tags,"),
    (TAUGHT + '--salt.kd_steps 2 --data.train_data_path "[1, {data}, 1, {place}/short]" '
     "--salt.selection [{place}/short_sequences.parquet,{place}/tags_sequences.parquet]",
     "short_sequences.parquet", "{data}.bin", "name the data"),
    (TAUGHT + "--salt.kd_steps 2 --salt.selection [{place}/foreign_sequences.parquet]",
     "foreign_sequences.parquet", "{data}.bin", "name the data it was made of"),
    # Where data lies.
    (TRAIN + "--data.train_data_path [{place}/tiny_txt_document]", "{place}/tiny_txt_document",
     "Did you mean", "tiny_text_document'"),
    (TRAIN + "--data.train_data_path [{place}/tiny]", "no dataset {place}/tiny:", "Did you mean"),
    (TRAIN + "--data.train_data_path [{data}.bin]", "{data}.bin", "prefix without its end"),
    (TRAIN + "--data.train_data_path [{data}_text_document]", "{data}_text_document",
     "Did you mean"),
    (TRAIN + "--data.train_data_path [{place}/no/py]", "{place}/no does not exist"),
    # Resuming and folders.
    (AGAIN + "--deepspeed_config {place}/batch.json", "{place}/run", "train_batch_size = 16",
     "keep train_batch_size = 8"),
    (AGAIN + "--deepspeed_config {place}/sgd.json", "{place}/sgd.json", "optimizer (type, amsgrad)",
     "train.init_from"),
    (AGAIN + "--model.num_layers 3", "{place}/run", "model.num_layers: 2 -> 3",
     "choose another train.output_dir"),
    (AGAIN + "--train.resume none", "{place}/run", "train.resume = none", "train.resume auto"),
    (TRAIN + "--train.output_dir {place}/ds.json", "{place}/ds.json is a file", "name a folder"),
    # The DeepSpeed JSON.
    (TRAIN + "--deepspeed_config {place}/five.json", "five.json", "train_batch_size = 16 is not "
     "a multiple of train_micro_batch_size_per_gpu = 5 * data-parallel size 1", "change"),
    (TRAIN + "--deepspeed_config {place}/comma.json", "comma.json:1:", "not valid JSON"),
    (TRAIN + "--deepspeed_config {place}/key.json", "key.json", "'train_batch_sise'",
     "Did you mean 'train_batch_size'?"),
    (TRAIN + "--deepspeed_config {place}/auto.json", "auto.json", "'train_batch_size' is \"auto\"",
     "write the number"),
    # Text to datasets.
    ("preprocess --input {place}/no.jsonl " + TEXT, "--input {place}/no.jsonl", "no such file"),
    ("preprocess --input {place}/text.jsonl --tokenizer {place}/no.model "
     "--output-prefix {place}/new", "{place}/no.model", "tokenizer"),
    ("preprocess --input {place}/false.jsonl.gz " + TEXT, "false.jsonl.gz", "copy the file again"),
    ("preprocess --input {place}/cut.jsonl.gz " + TEXT, "cut.jsonl.gz", "copy the file again"),
    ("preprocess --input {place}/text.jsonl --json-key body " + TEXT, "is --json-key 'body' right"),
    ("preprocess --input {place}/text.jsonl --tokenizer {data}.tokenizer "
     "--output-prefix {place}/tiny", "{place}/tiny_text_document", "--overwrite"),
    # Tags and selections.
    (TAG + "--window 32", "--window 32", "16 tokens", "at most 16"),
    ("tag --data {data} --teacher {place}/run --output-prefix {place}/tags", "tags.tags.json",
     "differ in", "choose another --output-prefix"),
    (TAG.replace("{data}", "{data}.idx"), "{data}.idx", "prefix without its end"),
    (SELECT + "--tags {place}/tags_sequences.parquet", "tags_sequences.parquet",
     "give {place}/tags"),
    (SELECT + "--tags {place}/tags.tags.json", "tags.tags.json", "give {place}/tags"),
    (SELECT + "--tags {place}/tags --top-fraction 1.5", "--top-fraction 1.5", "at most 1"),
    (SELECT + "--tags {place}/tags --reference {place}/tags", "of one model", "--reference"),
    (SELECT + "--tags {place}/tags {place}/foreign --top-fraction 0.1 0.2 0.3", "3 fractions",
     "2 --tags", "one for each"),
    ("select --tags {place}/tags --output-prefix {place}/foreign_sequences --top-fraction 0.2",
     "foreign_sequences.parquet", "top 0.5", "choose another --output-prefix"),
    # Checkpoints.
    ("evaluate --checkpoint {place}/moved", "data/tiny_text_document", "--data"),
    ("evaluate --checkpoint {place}/nowhere", "{place}/nowhere", "does not exist"),
    ("convert --from {place}/nowhere --to {place}/new", "{place}/nowhere", "does not exist"),
    ("convert --from {place}/run --to {place}/hf", "{place}/hf is there already", "name another"),
    ("convert --from {place}/hf --to {place}/new", "model_type = 'olmo2'", "teacher.hf"),
    (TRAIN + "--teacher.checkpoint {place}/hf --salt.kd_steps 2", "`megatron-salt convert` makes"),
    (TRAIN + "--train.init_from {place}/run --model.num_layers 3", "has num_layers 2, not 3",
     "model.yaml"),
    (TRAIN + "--train.export_hf {place}/hf", "{place}/hf is there already"),
    (TRAIN + "--model.add_qkv_bias true --model.qk_layernorm true --train.export_hf {place}/new",
     "no class of transformers", "model.qk_layernorm = True, not False"),
    ("generate --checkpoint {place}/nowhere --prompt a", "{place}/nowhere", "does not exist"),
    ("compare --baseline {place}/run --run {place}/nowhere --output {place}/r.md",
     "{place}/nowhere", "Name a run's output directory"),
    # Other commands.
    ("merge {data} {place}/tiny --output-prefix {place}/new", "no dataset {place}/tiny:",
     "Did you mean '{data}'?"),
    ("subset {data} --share 2 --output-prefix {place}/new", "--share 2.0", "at most 1"),
    ("subset {data} --source wiki --output-prefix {place}/new", "no source 'wiki'",
     "tiny_text_document"),
    ("inspect {place}/tiny", "no dataset {place}/tiny:", "Did you mean '{data}'?"),
    ("inspect {data} --tags {place}/tags_mask.bin", "tags_mask.bin", "give {place}/tags,"),
    ("tokenizer --input {place}/text.jsonl --output {place}/tokenizer", "--output {place}/tok",
     "must end in .model"),
    ("tokenizer --input {place}/text.jsonl --output {place}/new.model --vocab-size 9000",
     "vocabulary of 9000", "give more text or another --vocab-size"),
    ("corpus --output {place}/new.jsonl --source {place}/no", "--source {place}/no",
     "not a directory"),
    ("examples {place}", "{place} is there already", "name a folder that is new"),
    ("generate --checkpoint {place}/run", "no prompt", "--prompt TEXT"),
    ("plan --config {place}/run.yaml --deepspeed_config {place}/ds.json --gpus 8 --gpu h1000",
     "--gpu h1000", "Did you mean 'h100'?"),
    ("plan --config {place}/run.yaml --gpus 8 --gpu h100 --salt.kd_wieght 1", "--salt.kd_wieght",
     "Did you mean '--salt.kd_weight'?"),
    ("kernels --requier cuda", "--requier cuda"),
    ("plan --config {place}/run.yaml --gpus 8", "--gpu", "plan --help"),
    ("plan --gpus 8 --gpu h100", "--config FILE.yaml is not given", "model.num_layers"),
    ("completion ksh", "'ksh'", "bash"),
    ("tga", "no command 'tga'", "Did you mean 'tag'?"),
    # What the JSON owns of a run is an option of a tool.
    (TAG + "--micro-batch-size 3", "--micro-batch-size", "Did you mean '--micro_batch_size'?"),
]  # fmt: skip


@pytest.fixture(scope="module")
def place(dataset: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, a finished run on it, its tags, and files with a mistake each."""
    place = tmp_path_factory.mktemp("slips")
    for path in dataset.parent.glob(dataset.name + ".*"):
        copied = place / path.name
        shutil.copytree(path, copied) if path.is_dir() else shutil.copy(path, copied)
    shutil.copytree(teacher, place / "run")
    config = json.loads((teacher / "config.json").read_text())
    config["train"]["output_dir"] = str(place / "begun")
    config["data"]["train_data_path"] = [str(place / dataset.name)]
    (place / "run.yaml").write_text(json.dumps(config))
    shutil.copy(make_deepspeed(place), place / "ds.json")
    deepspeed = json.loads((place / "ds.json").read_text())
    for name, batch, micro in (("batch", 16, 2), ("five", 16, 5), ("auto", "auto", 2)):
        changed = {"train_batch_size": batch, "train_micro_batch_size_per_gpu": micro}
        (place / f"{name}.json").write_text(json.dumps(deepspeed | changed))
    other = deepspeed | {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    (place / "sgd.json").write_text(json.dumps(other))
    (place / "key.json").write_text(json.dumps(deepspeed | {"train_batch_sise": 8}))
    (place / "comma.json").write_text('{"train_batch_size": 8,}')
    for name, text in (
        ("lr", "train: {lr: 1.0e-3}"), ("batch", "train: {batch_size: 8}"),
        ("bf16", "bf16: {enabled: true}"), ("decay", "train: {weight_decay: 0.1}"),
        ("zero", "zero: {stage: 1}"), ("syntax", "train:\n  steps: [1\n"),
    ):  # fmt: skip
        (place / f"{name}.yaml").write_text(text)
    (place / "hf").mkdir()
    (place / "hf" / "config.json").write_text('{"model_type": "olmo2"}')
    (place / "text.jsonl").write_text('{"text": "some words"}\n')
    shutil.copy(place / "text.jsonl", place / "false.jsonl.gz")
    (place / "cut.jsonl.gz").write_bytes(bytes.fromhex("1f8b0800000000000003ab56"))
    write_tags(place / "tags", dataset)
    write_tags(place / "window", dataset, window=8)
    write_scores(place / "foreign", range(10))
    write_dataset(place / "short", Path(f"{dataset}.tokenizer"), [[7] * 40] * 30)
    write_tags(place / "short", place / "short")
    move_run(teacher, place / "moved")
    other_words = [f"other words, number {n}, said {n * n} times" for n in range(300)]
    of_another = list_checkpoints(Path(shutil.copytree(teacher, place / "other")))[-1]
    train_tokenizer(other_words, of_another / "tokenizer" / "tokenizer.model", vocab_size=330)
    edit_manifest(of_another)
    return place


def move_run(run: Path, to: Path) -> None:
    """A run that was made in another folder, from which its data was named."""
    data = {"train_data_path": ["data/tiny_text_document"]}
    edit_manifest(
        list_checkpoints(Path(shutil.copytree(run, to)))[-1],
        lambda values: values["training"]["config"]["data"].update(data),
    )


@pytest.mark.parametrize("slip", SLIPS, ids=[str(number) for number in range(len(SLIPS))])
def test_slip(place: Path, tmp_path: Path, slip: tuple[str, ...]) -> None:
    names = {"place": str(place), "data": str(place / "tiny_text_document")}
    command, *says = (text.format(**names) for text in slip)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_forked("-m", "megatron_salt", *shlex.split(command), folder=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(command, done.stderr, sep="\n")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stdout == ""
    before_it, message = done.stderr.split(": error: ")  # exactly one
    said_by = before_it.splitlines()[-1]
    assert said_by in ("megatron-salt", f"megatron-salt {command.split()[0]}")
    assert len(message.splitlines()) <= 8
    for words in says:
        assert words in message
    # Of the processor: a busy machine does not count.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10
