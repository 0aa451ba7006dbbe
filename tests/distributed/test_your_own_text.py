"""The ten commands of docs/your-own-text.md, as they stand there, on a small text. The wheel."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from commands import ROOT, run_forked

PAGE = ROOT / "docs" / "your-own-text.md"
# Fewer steps than the page's, and a vocabulary for which the text is large enough.
SHORTER = {"200": "24", "80": "4", "30": "2", "2048": "700", "40": "6"}


def commands_of_page() -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return [shlex.split(block.replace("\\\n", " ")) for block in blocks]


def write_text(path: Path) -> None:
    """English and code: lines of this repository's own documents."""
    lines = []
    for number, source in enumerate(["docs/method.md", "docs/data.md", "README.md"]):
        for text in (ROOT / source).read_text(encoding="utf-8").split("\n\n"):
            lines.append(json.dumps({"text": text, "source": "ab"[number % 2]}) + "\n")
    path.write_text("".join([*lines, lines[0]]), encoding="utf-8")


def test_ten_commands(tmp_path: Path) -> None:
    """Each succeeds after the ones before it, in an empty folder."""
    write_text(tmp_path / "text.jsonl")
    printed = []
    for words in commands_of_page():
        assert words[0] == "megatron-salt"
        short = [SHORTER.get(word, word) for word in words[1:]]
        done = run_forked("-m", "megatron_salt", *short, folder=tmp_path, there=True)
        assert done.returncode == 0, (words, done.stderr[-3000:])
        printed.append(done.stdout + done.stderr)
    assert len(printed) == 10
    assert "1 duplicates" in printed[2] and "trains nothing" not in printed[7]
    assert "KD phase over, teacher released" in printed[7]
    assert all(f"valid_ce_nats/{name}" in (tmp_path / "runs/salt/metrics.jsonl").read_text()
               for name in "ab")  # fmt: skip
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "salt" in report and (tmp_path / "report-heldout-steps.png").is_file()
    assert all(f"runs/{name}, step 24" in printed[9] for name in ("slm", "baseline", "salt"))


@pytest.mark.slow
def test_the_wheel_is_the_product(tmp_path: Path) -> None:
    """Built from the files that git knows, installed into an environment of its own that has the
    dependencies, and used in an empty folder. CUDA code is left to its first use: that takes a
    minute."""
    sources, wheels, work = (tmp_path / name for name in ("sources", "wheels", "work"))
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (sources / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, sources / name)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run(
        [*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", wheels, sources],
        check=True, env={**env, "MEGATRON_SALT_CUDA": "0"},
    )  # fmt: skip
    (wheel,) = wheels.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for needed in ("kernels/csrc/kd_loss.cu", "kernels/lib/", "examples/slurm/pretrain_salt.sbatch",
                   "examples/configs/tiny.yaml", "commands/tag.py"):  # fmt: skip
        assert any(name.startswith(f"megatron_salt/{needed}") for name in names), needed
    assert not [name for name in names if name.startswith(("tests/", "tools/", "docs/"))]
    venv.create(tmp_path / "env", symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "env")}))
    with_pip = [*pip[:3], "--python", str(tmp_path / "env" / "bin" / "python"), *pip[3:]]
    subprocess.run([*with_pip, "install", "--no-deps", "--no-index", wheel], check=True, env=env)
    assert (site / "megatron_salt" / "__main__.py").is_file()
    # A line of a .pth is a folder, whose own .pth files, as of a checkout, are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def megatron_salt(*words: str) -> str:
        done = subprocess.run(
            [tmp_path / "env" / "bin" / "megatron-salt", *words], cwd=work, env=env,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    work.mkdir()
    assert megatron_salt("--version") == f"megatron-salt {metadata.version('megatron_salt')}\n"
    write_text(work / "text.jsonl")
    examples, tokenizer, preprocess, *_ = (words[1:] for words in commands_of_page())
    assert "examples/slurm/pretrain_salt.sbatch" in megatron_salt(*examples)
    assert os.access(work / "examples" / "slurm" / "local_cluster.sh", os.X_OK)
    megatron_salt(*(SHORTER.get(word, word) for word in tokenizer))
    megatron_salt(*preprocess)
    assert f"native     available: {site}/megatron_salt/kernels/lib" in megatron_salt("kernels")
