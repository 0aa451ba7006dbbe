"""Damages every file that the package reads, and sees what its reader makes of that.

    python tests/file_mutations.py --count 30000 --seed 0

The reader must refuse with an error of a user's type that names the file, or read what was written,
or, where nothing vouches for the content, something else of the right form. All else is a finding.
A new kind of file is one more line in `make_kinds`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from small_datasets import write_dataset
from tiny import ADAM, LLAMA, make_config
from tiny_logits import make_settings, write_logits
from tiny_tags import write_tags

from megatron_salt.checkpoint.folder import hash_files, list_files
from megatron_salt.checkpoint.manifest import (
    MANIFEST,
    CheckpointManifest,
    Evaluation,
    ModelRecord,
    RunRecord,
    installed_versions,
    manifest_text,
    read_checkpoint_manifest,
    tokenizer_folder,
)
from megatron_salt.checkpoint.weights import (
    read_teacher_scores,
    read_weights,
    write_teacher_scores,
    write_weights,
)
from megatron_salt.config.command_line import parse_command_line, write_config
from megatron_salt.config.deepspeed import load_deepspeed_config
from megatron_salt.corpus.python_sources import make_corpus
from megatron_salt.corpus.train_tokenizer import train_tokenizer
from megatron_salt.data.dataset import DataSource
from megatron_salt.data.logits import StoredLogits, encode_logits, verify_logits
from megatron_salt.data.logits_log import LogitsLog
from megatron_salt.data.manifest import verify_dataset
from megatron_salt.data.selection import load_selection, read_table
from megatron_salt.data.sequences import Sequences
from megatron_salt.data.sources import load_sources
from megatron_salt.data.tags import open_indexed, read_stream, table_path, verify_tags
from megatron_salt.data.tokenizer import load_tokenizer
from megatron_salt.huggingface.convert import export_checkpoint, import_folder
from megatron_salt.method.switch import SwitchState
from megatron_salt.model.weights import weight_table
from megatron_salt.parallel import endings
from megatron_salt.planner.times import read_measured
from megatron_salt.report.runs import load_run
from megatron_salt.scoring.shards import _check_identity, read_shards, save_shard, shard_path
from megatron_salt.training.metrics import read_metrics

OUTCOMES = ("refused", "read right", "read as other", "finding")
LONGEST_S = 20.0
VOCAB, TOKENS = 509, 60


@dataclass(frozen=True)
class Kind:
    """Files that one reader reads."""

    name: str
    paths: list[Path]
    read: Callable[[], Any]
    hashed: bool
    """Whether no other content may be read."""
    names: tuple[str, ...] = ()
    """What an error may name in place of the file."""
    restores: tuple[Path, ...] = ()
    """Files that reading changes."""


def seen(value: Any) -> str:
    """What a reader has read, so that it can be compared."""
    if isinstance(value, torch.Tensor):
        value = value.numpy()
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{value.shape}{value.tobytes()!r}"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {seen(each)}' for key, each in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(seen, value))}]"
    return repr(value)


def make_kinds(folder: Path) -> list[Kind]:
    """Small files of every kind, in `folder`, and their readers."""
    os.chdir(folder)
    make_corpus(folder / "all.jsonl", max_bytes=200_000)
    lines = (folder / "all.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [text for line in lines if (text := json.loads(line)["text"]).isascii()]
    for name in ("t.model", "t.json"):
        train_tokenizer(texts, folder / name, vocab_size=VOCAB)
    data = folder / "data"
    ids = np.random.default_rng(0).integers(3, VOCAB, size=(12, TOKENS))
    write_dataset(data, folder / "t.model", ids.tolist(), ["web", "books"] * 6)
    for end in ("bin", "idx"):
        shutil.copy(f"data.{end}", f"plain.{end}")
    shutil.copytree("data.tokenizer", "plain.tokenizer")
    return [
        *_tokenizers(folder), *_datasets(folder), *_checkpoints(folder), *_tags(folder, data),
        *_logits(folder, data), *_settings(folder, data), *_caches(folder, data),
    ]  # fmt: skip


def _tokenizers(folder: Path) -> Iterator[Kind]:
    def read(path: Path) -> Any:
        made = load_tokenizer(path)
        return made.tokens(), made.eod, made.encode_batch(["def f(x):"]), made.decode([5, 6])

    for name in ("t.model", "t.json"):
        path = folder / name
        yield Kind(f"tokenizer, {path.suffix}", [path], lambda path=path: read(path), False)


def _datasets(folder: Path) -> Iterator[Kind]:
    def read(prefix: str) -> Any:
        tokenizer = load_tokenizer(f"{prefix}.tokenizer")
        made, found = verify_dataset(prefix, tokenizer), open_indexed(prefix)
        return (
            made,
            np.array(found.bin_reader.read(found.index.dtype, 12 * TOKENS, 0)),
            [found.document_indices.tolist(), found.sequence_lengths.tolist()],
        )

    def of(name: str) -> list[Path]:
        return [folder / f"{name}.idx", folder / f"{name}.bin"]

    yield Kind("dataset, .idx and .bin", of("data"), lambda: read("data"), True,
               names=("data.bin",))  # fmt: skip
    yield Kind("dataset, manifest", [folder / "data.manifest.json"], lambda: read("data"), False,
               names=("data.idx", "data.bin", "the dataset data"))  # fmt: skip
    yield Kind("dataset, sources", [folder / "data.sources.parquet"],
               lambda: vars(load_sources("data")), True)  # fmt: skip
    yield Kind("dataset without manifest", of("plain"), lambda: read("plain"), False,
               names=("plain.bin",))  # fmt: skip


def _checkpoints(folder: Path) -> Iterator[Kind]:
    path, config = folder / "run/checkpoints/step_00000004", make_config("data", "run")
    path.mkdir(parents=True)
    tokenizer = load_tokenizer("t.model")
    table = weight_table(config.model, VOCAB, 16)
    weights = {name: torch.rand(spec.shape) for name, spec in table.items()}
    write_weights(path, 0, 0, weights)
    tokenizer.save(path / "tokenizer")
    scores = {"loss_NS": torch.rand(2, 16), "packed": torch.rand(9, dtype=torch.float64)}
    write_teacher_scores(path, scores, "samples")
    manifest = CheckpointManifest(
        model=ModelRecord(
            name="run/step", step=4, config=config.model, vocab_size=VOCAB, num_positions=16,
            seq_length=16, objective=["causal"], tokenizer_fingerprint=tokenizer.fingerprint,
            precision="fp32", tp_size=1, pp_size=1,
            evaluation=Evaluation(step=4, ce_nats=5.5, accuracy=0.1, tokens=32, data="text"),
        ),
        training=RunRecord(
            config=config, step=4, phase="lm", tokens=512, data_rows=32, data=["text"], dp_size=1,
            zero_stage=0, teacher_valid_ce_nats=5.25, teacher_fingerprint="teacher", tags=[],
            selection=[], switch=SwitchState(),
        ),
        versions=installed_versions(), files=hash_files(path, list_files(path)),
    )  # fmt: skip
    (path / MANIFEST).write_text(manifest_text(manifest), encoding="utf-8")

    def reader(read: Callable[[Path, CheckpointManifest], Any]) -> Callable[[], Any]:
        return lambda: read(path, read_checkpoint_manifest(path))

    def of_tokenizer(path: Path, manifest: CheckpointManifest) -> Any:
        return load_tokenizer(tokenizer_folder(path, manifest)).tokens()

    yield Kind("checkpoint, manifest", [path / MANIFEST], reader(lambda path, it: it), True)
    yield Kind("checkpoint, weights", sorted(path.glob("weights/*")), reader(read_weights), True)
    yield Kind("checkpoint, tokenizer", sorted(path.glob("tokenizer/*")), reader(of_tokenizer),
               True)  # fmt: skip
    yield Kind("checkpoint, held-out losses", sorted(path.glob("held_out/*")),
               reader(read_teacher_scores), True)  # fmt: skip
    export_checkpoint(str(path), folder / "hf", tokenizer_as_is=True)
    made = folder / "imported"

    def read_hf() -> Any:
        shutil.rmtree(made, ignore_errors=True)
        about = import_folder(folder / "hf", made)
        return about, read_weights(made, read_checkpoint_manifest(made))

    yield Kind("Hugging Face folder", [p for p in sorted((folder / "hf").iterdir())
                                       if p.name != "generation_config.json"],
               read_hf, False, names=(str(folder / "hf"),))  # fmt: skip


def _tags(folder: Path, data: Path) -> Iterator[Kind]:
    tokenizer = load_tokenizer("t.model").fingerprint
    write_tags(folder / "tags", data)
    shutil.copy(table_path(folder / "tags"), folder / "chosen.parquet")

    def read() -> Any:
        made = verify_tags("tags", "data", tokenizer)
        found = [open_indexed(f"tags_{kind}") for kind in made.stored]
        return (
            made,
            [read_stream(each, 0, 12 * TOKENS) for each in found],
            read_table(table_path("tags")).columns,
        )

    files = sorted(folder.glob("tags_*"))
    yield Kind("tags", files, read, True)
    yield Kind("tags, manifest", [folder / "tags.tags.json"], read, False)

    def read_selection() -> Any:
        return vars(load_selection("chosen.parquet", "data", tokenizer))

    yield Kind("selection", [folder / "chosen.parquet"], read_selection, False)


def _logits(folder: Path, data: Path) -> Iterator[Kind]:
    tokenizer, settings = load_tokenizer("t.model").fingerprint, make_settings(vocab_size=VOCAB)
    places, random = 12 * (TOKENS), np.random.default_rng(1)
    ids_SK = np.argsort(random.random((places, VOCAB)))[:, :8].astype(np.int32)
    values_SK = np.sort(-random.random((places, 8)))[:, ::-1].astype(np.float32) - 2.0
    of_token = {name: -random.random(places, np.float32) for name in ("rest", "entropy", "loss")}
    write_logits(folder / "big", data, settings, ids_SK, values_SK, of_token, tokenizer)

    def read() -> Any:
        made = verify_logits("big", "data", tokenizer)
        return made, StoredLogits("big", made, top_k=None).of_places(np.arange(places))

    yield Kind("stored logits", sorted(folder.glob("big_*")), read, True)
    yield Kind("stored logits, manifest", [folder / "big.logits.json"], read, False,
               names=("big_",))  # fmt: skip
    made = encode_logits(settings, ids_SK[:32], values_SK[:32],
                         {name: value[:32] for name, value in of_token.items()})  # fmt: skip
    log = LogitsLog(folder / "log", settings, "run", 0)
    log.write(1, np.array([0, 1]), made)
    log.close()

    def read_log() -> Any:
        LogitsLog(folder / "log", settings, "run", 2).close()
        return [path.read_bytes() for path in sorted((folder / "log").iterdir())]

    files = [folder / "log/about.json", folder / "log/index.bin"]
    yield Kind("log of logits", files, read_log, False, names=(str(folder / "log"),),
               restores=tuple(sorted((folder / "log").iterdir())))  # fmt: skip


def _settings(folder: Path, data: Path) -> Iterator[Kind]:
    config, run = make_config("data", "run"), folder / "run"
    values = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "optimizer": ADAM,
              "gradient_clipping": 1.0, "zero_optimization": {"stage": 1}}  # fmt: skip
    for path in (folder / "ds.json", run / "deepspeed.json"):
        path.write_text(json.dumps(values, indent=2), encoding="utf-8")
    (folder / "run.yaml").write_text(
        f"# A run\nmodel: {json.dumps(LLAMA)}\ndata:\n  train_data_path: [0.5, data, 0.5, plain]\n"
        "train:\n  steps: 5\n  output_dir: run\n  min_lr_ratio: 1.0e-1\n", encoding="utf-8",
    )  # fmt: skip
    write_config(config, run / "config.json")
    row = {"phase": "lm", "ce_nats": 6.0, "kl_nats": 0.0, "kd_weight": 0.0, "loss": 6.0, "lr": 0.1,
           "grad_norm": 1.0, "tokens": 128, "step_time_s": 0.1, "tokens_per_s": 1280.0,
           "teacher_time_s": None, "valid_ce_nats": 5.5, "valid_accuracy": 0.1,
           "valid_tokens": 32}  # fmt: skip
    rows = [{"step": step, **row} for step in range(1, 5)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "metrics.jsonl").write_text(text, encoding="utf-8")
    measured = {"forward_s": [0.1, 0.2], "backward_s": [0.2, 0.4], "update_s": 0.01}
    (run / "measured_times.json").write_text(json.dumps(measured), encoding="utf-8")

    def read_config(path: str) -> Any:
        return parse_command_line(["--config", path, "--deepspeed_config", "ds.json"])

    sections = tuple(f"{name}{end}" for name in config.to_dict() for end in ".:")
    for name in ("run.yaml", "run/config.json"):
        yield Kind(f"settings, {Path(name).name}", [folder / name],
                   lambda name=name: read_config(name), False, names=sections)  # fmt: skip
    yield Kind("DeepSpeed JSON", [folder / "ds.json"],
               lambda: load_deepspeed_config("ds.json", 1), False)  # fmt: skip
    yield Kind("metrics, at a resume", [run / "metrics.jsonl"],
               lambda: read_metrics(run / "metrics.jsonl", 4), False)  # fmt: skip
    yield Kind("metrics, config and manifest, report",
               [run / "metrics.jsonl", run / "config.json", run / "deepspeed.json",
                run / "checkpoints/step_00000004" / MANIFEST],
               lambda: vars(load_run(run)), False)  # fmt: skip
    yield Kind("measured times", [run / "measured_times.json"],
               lambda: read_measured("run/measured_times.json"), False)  # fmt: skip


def _caches(folder: Path, data: Path) -> Iterator[Kind]:
    lengths = np.full(12, TOKENS)
    sequences = Sequences.of(lengths, None)
    shards = [(0, 12)]
    arrays = {"table_sequence": np.arange(12), "table_tokens": lengths, "mask": np.ones(12)}
    (folder / "shards").mkdir()
    identity = {"model": {"step": 3, "name": "slm"}, "tokens_per_shard": 4}
    _check_identity(folder / "shards/identity.json", identity)
    save_shard(shard_path(folder / "shards", 0), arrays)
    yield Kind("shards", [shard_path(folder / "shards", 0)],
               lambda: list(read_shards(folder / "shards", sequences, shards)), False)  # fmt: skip
    yield Kind("shards, identity", [folder / "shards/identity.json"],
               lambda: _check_identity(folder / "shards/identity.json", identity), False,
               names=(str(folder / "shards"),))  # fmt: skip
    config = make_config("data", "run").data
    tokenizer = load_tokenizer("t.model")

    def read() -> Any:
        source = DataSource(config, tokenizer, num_samples=8, seed=1, cache_path=folder / "cache")
        return [vars(source.read(range(8))), vars(source.read_held_out([0, 1]))]

    read()
    files = [path for path in sorted((folder / "cache").rglob("*"))
             if path.is_file() and path.name != "lock"]  # fmt: skip
    yield Kind("index cache", files, read, True, restores=tuple(files))


def mutate(content: bytes, random: np.random.Generator) -> bytes:
    """The content with one damage, of bytes or, half the time if it is JSON, of what it says."""
    if random.random() < 0.6 and content[:1] == b"{":
        try:
            return _mutate_json(json.loads(content), random)
        except ValueError:
            pass
    size, damaged = len(content), bytearray(content)
    at, many = int(random.integers(size)), int(random.integers(1, 64))
    which = int(random.integers(8))
    if which <= 2:
        damaged[at] ^= 1 << int(random.integers(8))
    elif which == 3:
        damaged[at] = int(random.integers(256))
    elif which == 4:
        del damaged[at:]
    elif which == 5:
        damaged += random.bytes(many)
    elif which == 6:
        damaged[at : at + many] = bytes(len(damaged[at : at + many]))
    else:
        damaged = damaged[size // 2 :] + damaged[: size // 2]
    return bytes(damaged)


def _mutate_json(values: Any, random: np.random.Generator) -> bytes:
    """One value is changed, retyped, removed, given twice, nested, or renamed."""
    places: list[tuple[Any, Any]] = []

    def collect(value: Any) -> None:
        if isinstance(value, dict | list):
            for key in value if isinstance(value, dict) else range(len(value)):
                places.append((value, key))
                collect(value[key])

    collect(values)
    if not places:
        return b"[]"
    holder, key = places[int(random.integers(len(places)))]
    marker = "<here>"
    odd = [
        "1e999", "-1", "0", "NaN", "1" * 400, "1" * 5000, "1e308", "true", "null", '"x"', '""',
        "[]", "{}", "[1]", '{"a": 1}', "2147483648", "9223372036854775808", "0.5", '"../../x"',
        '"/etc/hostname"', '"\\u0000"', '"\\ud800"', "[" * 40 + "]" * 40, "[" * 900 + "]" * 900,
        "[" * 100_000, '{"a":' * 5000,
    ]  # fmt: skip
    which = int(random.integers(10))
    if which == 0:
        del holder[key]
    elif which == 1 and isinstance(holder, dict):
        return (
            json.dumps(values)
            .replace(f"{json.dumps(key)}: ", f"{json.dumps(key)}: 7, {json.dumps(key)}: ", 1)
            .encode()
        )
    elif which == 2 and isinstance(holder, dict):
        holder[["x", "../x", "", "\ud800"][int(random.integers(4))]] = holder.pop(key)
    elif which == 3 and isinstance(holder[key], int | float):
        holder[key] = holder[key] * 2 + 1
    else:
        holder[key] = marker
    text = json.dumps(values, indent=[None, 1][int(random.integers(2))])
    return text.replace(f'"{marker}"', odd[int(random.integers(len(odd)))]).encode()


def outcome(kind: Kind, path: Path, expected: str) -> tuple[str, str]:
    """One of OUTCOMES for what the reader does now, and what is wrong of a finding."""
    try:
        found = seen(kind.read())
    except (ValueError, OSError) as error:
        if any(name in str(error) for name in (path.name, *kind.names)):
            return "refused", ""
        return "finding", f"no file named: {type(error).__name__}: {error}"[:300]
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        return "finding", f"{type(error).__name__} at {place}: {error}"[:300]
    if found == expected:
        return "read right", ""
    if kind.hashed:
        return "finding", f"{path.name}: other content was read"
    return "read as other", ""


def _refuse(program: str, message: object, *, here: bool | None = None) -> None:
    raise ValueError(message)


def _work(kinds: list[Kind], numbers: range, seed: int, pipe: Any) -> None:
    """Mutations of these numbers, of each kind in turn; sends each number before and after."""
    endings.refuse = _refuse  # type: ignore[assignment]
    for stream in (1, 2):  # libraries write there too
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    expected: dict[str, str] = {}
    for number in numbers:
        kind = kinds[number % len(kinds)]
        random = np.random.default_rng([seed, number])
        path = kind.paths[int(random.integers(len(kind.paths)))]
        before = {each: each.read_bytes() for each in {path, *kind.restores}}
        if kind.name not in expected:
            expected[kind.name] = seen(kind.read())
        path.write_bytes(mutate(before[path], random))
        try:
            found = outcome(kind, path, expected[kind.name])
        finally:
            for each, content in before.items():
                each.write_bytes(content)
        pipe.send((number, *found))


def _processor_s(pid: int | None) -> float:
    """Seconds of the processor that this process has had; 0 if it has ended."""
    try:
        return float(sum(psutil.Process(pid).cpu_times()[:2]))
    except psutil.NoSuchProcess:
        return 0.0


def run_mutations(kinds: list[Kind], count: int, seed: int) -> dict[str, Counter[str]]:
    """How often each outcome was met, by kind; findings also by what they are."""
    totals: dict[str, Counter[str]] = defaultdict(Counter)
    context, next_number = multiprocessing.get_context("fork"), 0
    contents = {path: path.read_bytes() for kind in kinds for path in (*kind.paths, *kind.restores)}
    while next_number < count:
        ours, theirs = context.Pipe(duplex=False)
        worker = context.Process(
            target=_work, args=(kinds, range(next_number, count), seed, theirs)
        )
        worker.start()
        theirs.close()
        problem = ""
        while next_number < count and not problem:
            name = kinds[next_number % len(kinds)].name
            try:
                began_s = _processor_s(worker.pid)
                for _ in range(30):  # of a busy machine's seconds most are not this process's
                    if ours.poll(LONGEST_S) or _processor_s(worker.pid) > began_s + LONGEST_S:
                        break
                if not ours.poll():
                    problem = f"hangs for {LONGEST_S} s"
                    break
                number, result, what = ours.recv()
            except EOFError:
                worker.join()
                problem = f"crashes: exit code {worker.exitcode}"
                break
            assert number == next_number
            totals[name][result] += 1
            if what:
                totals[name][f"{what} [{number}]"] += 1
            next_number += 1
        if problem:
            print(f"{name}: {problem} [{next_number}]", file=sys.stderr, flush=True)
            totals[name]["finding"] += 1
            totals[name][f"{problem} [{next_number}]"] += 1
            next_number += 1
            for path, content in contents.items():
                path.write_bytes(content)
        worker.kill()
        worker.join()
    return totals


class Payload:
    """A pickle of it makes a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def run_pickles(kinds: list[Kind], folder: Path) -> list[str]:
    """Puts pickles in place of every file, bare and as NumPy and PyTorch keep them; returns the
    kinds whose reader ran one."""
    marker, ran = folder / "ran", []
    load = Payload(marker)
    objects = np.array([load, load], dtype=object)
    np.save(folder / "p.npy", objects, allow_pickle=True)
    np.savez(folder / "p.npz", mask=objects, table_sequence=objects, table_tokens=objects)
    torch.save({"a": load}, folder / "p.pt")
    kept = [(folder / f"p.{end}").read_bytes() for end in ("npy", "npz", "pt")]
    forms = [pickle.dumps(load), *kept]
    endings.refuse = _refuse  # type: ignore[assignment]
    for kind in kinds:
        before = {path: path.read_bytes() for path in (*kind.paths, *kind.restores)}
        for path in kind.paths:
            for form in forms:
                path.write_bytes(form)
                outcome(kind, path, "")
                if marker.exists():
                    ran.append(f"{kind.name}: {path.name}")
                    marker.unlink()
                for each, content in before.items():
                    each.write_bytes(content)
    return ran


def table(totals: dict[str, Counter[str]]) -> str:
    """By kind, as Markdown, and the findings under it."""
    lines = ["| files | mutations | " + " | ".join(OUTCOMES) + " |", "| --- " * 6 + "|"]
    for name, counts in totals.items():
        numbers = [counts[each] for each in OUTCOMES]
        lines.append(f"| {name} | {sum(numbers)} | {' | '.join(map(str, numbers))} |")
    sums = [sum(counts[each] for counts in totals.values()) for each in OUTCOMES]
    lines.append(f"| all | {sum(sums)} | {' | '.join(map(str, sums))} |")
    for name, counts in totals.items():
        lines += [f"{name}: {what}" for what in counts if what not in OUTCOMES]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=30_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="kinds whose names have this in them")
    args = parser.parse_args()
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        kinds = [kind for kind in make_kinds(Path(folder)) if args.only in kind.name]
        totals = run_mutations(kinds, args.count, args.seed)
        ran = run_pickles(kinds, Path(folder))
        text = table(totals).replace(folder, "FOLDER")
        os.chdir(here)
    print(text)
    print(f"pickles that were run: {ran or 'none'}")
    return bool(ran) or any(counts["finding"] for counts in totals.values())


if __name__ == "__main__":
    sys.exit(main())
