"""Is the loss of a published model the same here as in transformers?

    pip install -e ".[example-hf]"
    python benchmarks/smollm2_loss.py [--model DIR]

SmolLM2-135M-Instruct in fp32 on a CPU, as examples/huggingface fetches it. Each text is a dataset
of one document and is scored as one row, to its end of document, with nothing in front of it:

- by transformers, from its fp32 logits in fp64;
- by `megatron-salt evaluate`, of the converted checkpoint;
- in runs of one and three tensor-parallel ranks, as the student that starts from it
  (`train.init_from`, the score before the first step) and as the teacher, a replica on each rank;
- of the first text also as a teacher that is spread over the ranks, and through `teacher.hf`.

Three ranks, not two: the model has 9 heads in 3 groups, which two ranks cannot share.

All must agree within 1e-6 of the loss, else the command fails. Also said is the loss that PyTorch
computes in fp32, which transformers reports: with this many columns it has an error of its own.
Writes results/smollm2_loss.json with machine and versions.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.nn.functional as F
import transformers

from megatron_salt.report.markdown import describe_machine

REPO = Path(__file__).parents[1]
LARGEST = 1e-6
"""Difference, relative to transformers' loss."""
TEXTS = {
    "argparse.__doc__": (argparse.__doc__ or "").strip(),
    "os.walk.__doc__": (os.walk.__doc__ or "").strip(),
    "LICENSE, 4000 characters": (REPO / "LICENSE").read_text(encoding="utf-8").strip()[:4000],
}
# name -> (tensor-parallel ranks, setting that names the teacher, further settings)
SETTINGS: dict[str, tuple[int, str, list[str]]] = {
    "tp 1": (1, "checkpoint", []),
    "tp 3": (3, "checkpoint", []),
}
OF_FIRST_TEXT: dict[str, tuple[int, str, list[str]]] = {
    "tp 3, teacher spread": (3, "checkpoint", ["--teacher.tensor_parallel", "true"]),
    "tp 3, teacher.hf": (3, "hf", []),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="as in examples/huggingface")
    parser.add_argument(
        "--output", type=Path, default=REPO / "benchmarks/results/smollm2_loss.json"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name) / "work"
        example = load_example()
        example.make_folder(work)
        folder = example.model_folder(arguments.model, work)
        salt("convert", "--from", folder, "--to", work / "checkpoint")
        found = {}
        theirs = by_transformers(folder)
        for number, (text, of_text) in enumerate(theirs.items()):
            prefix = dataset_of(TEXTS[text], folder, work / f"text_{number}")
            settings = SETTINGS if number else SETTINGS | OF_FIRST_TEXT
            scores = by_us(work, folder, prefix, of_text["tokens"], settings)
            found[text] = {**of_text, "ours": scores}
            print(json.dumps({text: found[text]}, indent=2), flush=True)
    largest = max(
        abs(score / each["transformers"] - 1)
        for each in found.values()
        for score in each["ours"].values()
    )
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "gguf")
    )
    result = {
        "machine": f"{describe_machine()}, {versions}",
        "model": model_name(arguments.model),
        "nats_per_token": found,
        "largest_relative_difference": largest,
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"largest relative difference: {largest:.1e}")
    if not largest <= LARGEST:
        raise SystemExit(f"smollm2_loss: the losses differ by more than {LARGEST}")


def model_name(folder: Path | None) -> str:
    """The GGUF file that is scored, or the folder's name; no path of a machine."""
    files = sorted(folder.glob("*.gguf")) if folder else []
    return files[0].name if files else folder.name if folder else "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_example() -> Any:
    """examples/huggingface/run.py as a module."""
    path = REPO / "examples/huggingface/run.py"
    spec = importlib.util.spec_from_file_location("example_hf", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def salt(*words: object, ranks: int = 1) -> None:
    """Run a command of the program. Raises: SystemExit with the end of what it said."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(launcher if ranks > 1 else []), "-m", "megatron_salt",
               *map(str, words)]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    if ranks > 1:
        environment["OMP_NUM_THREADS"] = "1"
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{' '.join(command)}\n{(ended.stdout + ended.stderr)[-3000:]}")


def by_transformers(folder: Path) -> dict[str, dict[str, Any]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    eod = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    found = {}
    for name, text in TEXTS.items():
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], eod]
        with torch.no_grad():
            logits_SV = model(torch.tensor([ids[:-1]])).logits[0]
        labels_S = torch.tensor(ids[1:])
        found[name] = {
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "tokens": len(labels_S),
            "transformers": float(F.cross_entropy(logits_SV.double(), labels_S)),
            "transformers, loss in fp32": float(F.cross_entropy(logits_SV, labels_S)),
        }
    return found


def dataset_of(text: str, folder: Path, place: Path) -> Path:
    place.mkdir()
    (place / "text.jsonl").write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    salt("preprocess", "--input", place / "text.jsonl", "--tokenizer", folder,
         "--output-prefix", place / "data", "--workers", 1)  # fmt: skip
    return place / "data_text_document"


def by_us(
    work: Path, folder: Path, prefix: Path, tokens: int,
    settings: dict[str, tuple[int, str, list[str]]],
) -> dict[str, float]:  # fmt: skip
    """The scores of one row of so many tokens."""
    checkpoint, place = work / "checkpoint", prefix.parent
    salt("evaluate", "--checkpoint", checkpoint, "--data", prefix, "--seq_length", tokens,
         "--output", place / "evaluate.json")  # fmt: skip
    (score,) = json.loads((place / "evaluate.json").read_text(encoding="utf-8"))
    assert score["valid_tokens"] == tokens
    found: dict[str, float] = {"evaluate": score["valid_ce_nats"]}
    deepspeed = place / "deepspeed.json"
    deepspeed.write_text(json.dumps({
        "train_batch_size": 1, "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-6, "torch_adam": True}},
    }))  # fmt: skip
    for name, (tp, kind, more) in settings.items():
        run = place / "run"
        salt("pretrain", "--config", checkpoint / "model.yaml", "--deepspeed_config", deepspeed,
             "--data.train_data_path", f"[{prefix}]", "--data.valid_data_path", f"[{prefix}]",
             "--data.seq_length", tokens, "--train.init_from", checkpoint,
             f"--teacher.{kind}", checkpoint if kind == "checkpoint" else folder,
             "--salt.kd_steps", 1, "--train.steps", 1, "--train.eval_samples", 1,
             "--train.tensorboard", "false", "--train.output_dir", run,
             "--parallel.tensor_model_parallel_size", tp, *more, ranks=tp)  # fmt: skip
        first = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
        assert first["step"] == 0
        found[f"{name}: student"] = first["valid_ce_nats"]
        found[f"{name}: teacher"] = first["teacher_valid_ce_nats"]
        shutil.rmtree(run)  # with optimizer state it is large
    return found


if __name__ == "__main__":
    main()
