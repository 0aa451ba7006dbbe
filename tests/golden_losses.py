"""Golden losses: what a tiny run computed at the versions and on the processor named beside it.

The parity tests compare layouts of one commit, so a change that moves all of them alike passes
there. Here 20 steps of each phase are compared with numbers in a file, at full precision.

    python tests/golden_losses.py        (make golden) records anew and prints what moved

The text is made here and not taken from this machine, so that the file serves every machine.
"""

from __future__ import annotations

import json
import math
import platform
import random
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from ranks import run_ranks
from tiny import GPT, LLAMA, TEACHER_MODEL, make_config, make_deepspeed, metrics_of, run_to_end

from megatron_salt.config.fields import RunConfig
from megatron_salt.corpus.preprocess import preprocess

FILE = Path(__file__).parent / "golden/losses.json"
STEPS, KD_STEPS, TEACHER_STEPS, EVAL_SAMPLES = 40, 20, 20, 5
RECORDED = ("loss", "ce_nats", "kl_nats", "grad_norm", "lr", "valid_ce_nats", "valid_accuracy")
MODELS = {"llama": {**LLAMA, "num_layers": 4}, "gpt": {**GPT, "num_layers": 4}}
# Model, precision, tp = pp. GPT has what Llama lacks: a tied head, LayerNorm, biases, positions.
RUNS = [
    ("llama", "fp32", 1),
    ("llama", "fp32", 2),
    ("llama", "bf16", 1),
    ("llama", "bf16", 2),
    ("gpt", "fp32", 1),
    ("gpt", "bf16", 2),
]
PACKAGES = ("torch", "megatron-core", "deepspeed", "numpy")
# Where versions or processor are others: the share by which a number may differ after 40 steps.
TOLERANCES = {"fp32": 1e-3, "bf16": 3e-2}


def name_of(model: str, precision: str, size: int) -> str:
    layout = "one process" if size == 1 else f"tp {size} pp {size}"
    return f"{model}, {precision}, {layout}"


def environment() -> dict[str, str]:
    """What the last bit depends on: versions, and the processor, by which libraries choose code."""
    facts: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    words = [facts.get(key, "?") for key in ("model name", "cpu family", "model")]
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "processor": "{}, family {}, model {}".format(*words),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def make_inputs(folder: Path) -> tuple[Path, Path]:
    """A dataset of 96 words in which each word suggests the next, and a teacher trained on it.

    Returns: the dataset's prefix, the teacher's output_dir.
    """
    draw = random.Random(12).random  # the same in every version of Python
    words = [f"w{index}" for index in range(96)]
    lines = []
    for _ in range(120):
        word, text = int(draw() * 96), []
        for _ in range(60):
            text.append(words[word])
            word = (5 * word + 7 + int(draw() ** 3 * 24)) % 96
        lines.append(json.dumps({"text": " ".join(text)}))
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    vocabulary = {word: index for index, word in enumerate([*words, "[UNK]", "<|endoftext|>"])}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": vocabulary["<|endoftext|>"], "content": "<|endoftext|>", "single_word": False,
             "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        ],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    preprocess([folder / "text.jsonl"], folder / "words", folder / "tokenizer.json", workers=1)
    prefix = folder / "words_text_document"
    config = make_config(
        prefix,
        folder / "teacher",
        model=TEACHER_MODEL,
        train__steps=TEACHER_STEPS,
        train__eval_samples=EVAL_SAMPLES,
    )
    run_ranks(1, _train, config, make_deepspeed(folder))
    return prefix, folder / "teacher"


def losses_of(
    folder: Path, prefix: Path, teacher: Path, model: str, precision: str, size: int
) -> dict[str, list[Any]]:
    """The recorded metrics of a run of both phases, one value per step that has it."""
    sections: dict[str, Any] = {"gradient_clipping": 0.5}
    if precision == "bf16":
        sections["bf16"] = {"enabled": True}
        sections["data_types"] = {"grad_accum_dtype": "fp32"}
        sections["zero_optimization"] = {"stage": 1}
    output_dir = folder / f"{model}-{precision}-{size}"
    config = make_config(
        prefix, output_dir, model=MODELS[model], teacher__checkpoint=str(teacher),
        parallel__tensor_model_parallel_size=size, parallel__pipeline_model_parallel_size=size,
        parallel__sequence_parallel=size > 1,
        salt__kd_steps=KD_STEPS, salt__kd_weight=0.6, salt__transition="linear_decay",
        salt__transition_steps=8, salt__teacher_temperature=2.0, salt__student_temperature=1.5,
        train__steps=STEPS, train__eval_interval=10, train__lr_schedule="cosine",
        train__lr_warmup_steps=4, train__eval_samples=EVAL_SAMPLES,
    )  # fmt: skip
    run_ranks(size * size, _train, config, make_deepspeed(folder, **sections))
    return recorded(output_dir)


def recorded(output_dir: Path) -> dict[str, list[Any]]:
    records = metrics_of(output_dir)
    return {key: [record[key] for record in records if key in record] for key in RECORDED}


def _train(config: RunConfig, deepspeed_config: str) -> None:
    run_to_end(config, deepspeed_config)


def differences(
    name: str, expected: dict[str, list[Any]], found: dict[str, list[Any]], tolerance: float = 0.0
) -> list[str]:
    """A line per metric that differs by more than this share: where first, and where most."""
    lines = []
    for key in sorted({*expected, *found}):
        before, now = expected.get(key, []), found.get(key, [])
        if len(before) != len(now):
            lines.append(f"{name}: {key}: {len(now)} values, {len(before)} in the file")
            continue
        moved = [
            index
            for index, (a, b) in enumerate(zip(before, now, strict=True))
            if a != b and not (tolerance and a and b and math.isclose(a, b, rel_tol=tolerance))
        ]
        if moved:
            first = moved[0]
            lines.append(
                f"{name}: {key}: {len(moved)} of {len(now)} values differ, first number {first}: "
                f"{now[first]!r}, {before[first]!r} in the file; last: {now[-1]!r}, {before[-1]!r}"
            )
    return lines


def main() -> None:
    old = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prefix, teacher = make_inputs(folder)
        runs = {"teacher": recorded(teacher)}
        for run in RUNS:
            runs[name_of(*run)] = losses_of(folder, prefix, teacher, *run)
    here = environment()
    for key, value in here.items():
        if old.get("environment", {}).get(key) != value:
            print(f"environment: {key} {old.get('environment', {}).get(key)} -> {value}")
    moved = [
        line
        for name, found in runs.items()
        for line in differences(name, old.get("runs", {}).get(name, {}), found)
    ]
    print("\n".join(moved) if moved else "nothing moved")
    text = json.dumps({"environment": here, "runs": runs}, indent=1)
    # One list a line, so that a difference of the file shows which metric of which run it is.
    lines, inside = [], False
    for line in text.splitlines():
        if inside:
            lines[-1] += line.strip() + (" " if line.endswith(",") else "")
        else:
            lines.append(line)
        inside = line.endswith("[") or (inside and "]" not in line)
    FILE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
