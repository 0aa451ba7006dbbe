"""A checkpoint looked into: what it is, what is wrong with it, in what two differ; and one made of
another at any layout. Checkpoints are made by hand; a run's: tests/distributed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import call
from safetensors import safe_open
from safetensors.torch import load_file
from stored import STAGES, TABLE, cuts, drawn, make_checkpoint, run_record
from torch import Tensor

from megatron_salt.checkpoint.folder import hash_files, list_files, write_model_manifest
from megatron_salt.checkpoint.inspection import rewrite_checkpoint, tensor_differences
from megatron_salt.checkpoint.manifest import (
    MANIFEST,
    CheckpointManifest,
    installed_versions,
    read_checkpoint_manifest,
    weights_fingerprint,
)
from megatron_salt.checkpoint.optimizer import OPTIMIZER_INDEX, StoredOptimizer, optimizer_file
from megatron_salt.checkpoint.weights import WeightFiles, weights_file
from megatron_salt.files.disk import save_tensors
from megatron_salt.model.weights import DTYPES, EMBEDDING, shard

QKV = "layers.1.self_attention.linear_qkv.weight"


def bytes_of(folder: Path) -> dict[str, str]:
    return {name: each["sha256"] for name, each in hash_files(folder, list_files(folder)).items()}


def signed_again(folder: Path, about: CheckpointManifest) -> None:
    """A manifest that is right about what the files hold now."""
    (folder / MANIFEST).unlink()
    write_model_manifest(folder, about.model, about.training, about.versions)


def change(file: Path, key: str, value: float) -> None:
    """One element of a tensor, the first one; the size of the file stays."""
    tensors = load_file(file)
    tensors[key].view(-1)[0] = value
    save_tensors(file, tensors)


def inspect(*words: str | Path) -> int:
    return call("inspect-checkpoint", *words)


def test_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scale = {"cur_scale": 65536.0, "cur_iter": 3.0}
    folder = make_checkpoint(
        tmp_path / "c", 2, "bf16", run=run_record(loss_scaler=scale, tokens=12_345)
    )  # fmt: skip
    assert inspect(folder) == 0
    text = capsys.readouterr().out
    size = {
        part: sum(file.stat().st_size for file in (folder / part).iterdir()) / 2**20
        for part in ("weights", "optimizer")
    }
    total = sum(spec.numel for spec in TABLE.values())
    for expected in (
        f"{folder}: m, step 1, next phase kd, 12,345 tokens of 8 sequences",
        f"model: {total:,} parameters, 2 layers of 16, vocabulary 21, sequences of 8, causal",
        "layout: tp 2, pp 2, dp 3, ZeRO 1, bf16",
        "optimizer: fp32, exp_avg, step 5, loss scale 65536",
        f"weights {size['weights']:.1f} MiB in 4 files",
        f"optimizer {size['optimizer']:.1f} MiB in 7 files",
        "in 13 files",
        f"torch 0.1 (here {installed_versions()['torch']})",
        "evaluation: 3.2500 nats/token after step 1, accuracy 0.1250, 640 tokens; its teacher's "
        "2.5000",
        "good for: to be resumed at any layout, to teach",
    ):
        assert expected in text
    own = read_checkpoint_manifest(folder)
    (folder / MANIFEST).unlink()
    write_model_manifest(folder, dataclasses.replace(own.model, evaluation=None))
    assert inspect(folder) == 0
    text = capsys.readouterr().out
    assert "not to be resumed: no run" in text and "(here" not in text
    assert "evaluation: none\n" in text and "dp" not in text.split("layout: ")[1].split("\n")[0]


def test_an_output_dir_lists_its_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run/checkpoints"
    make_checkpoint(folder / "step_00000002")
    for name in ("step_00000004", "damaged_step_00000003", ".step_00000006.partial"):
        shutil.copytree(folder / "step_00000002", folder / name)
    (folder / "damaged_step_00000003/deepspeed.json").unlink()
    assert inspect(tmp_path / "run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == [
        ".step_00000006.partial", "damaged_step_00000003", "step_00000002", "step_00000004",
    ]  # fmt: skip
    assert "unfinished" in lines[0] and lines[2].endswith("  whole")
    assert "set aside: " in lines[1] and "deepspeed.json: missing" in lines[1]
    assert lines[4].startswith(f"{folder / 'step_00000004'}: m, step 1")
    assert inspect(tmp_path / "run", "--verify") == 0
    (folder / "step_00000002" / weights_file(1, 0)).write_bytes(b"cut")
    assert inspect(tmp_path / "run") == 1
    out = capsys.readouterr().out
    assert "step_00000002" in out and "damaged: " in out and weights_file(1, 0) in out
    assert inspect(tmp_path / "run", "--verify") == 1
    out = capsys.readouterr().out
    assert f"{folder / 'step_00000002'}: damaged\n" in out
    assert f"{folder / 'step_00000004'}: all of it verified\n" in out and "damaged_" not in out
    # Without a manifest it is no checkpoint for a run, and still one that is listed.
    (folder / "step_00000004" / MANIFEST).unlink()
    (folder / "step_00000002" / MANIFEST).unlink()
    assert inspect(tmp_path / "run") == 1
    assert capsys.readouterr().out.count("manifest.json: cannot be read") == 2


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_verified_with_every_byte(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], precision: str
) -> None:
    folder = make_checkpoint(tmp_path / "c", 2, precision)
    assert inspect(folder, "--verify") == 0
    assert capsys.readouterr().out == f"{folder}: all of it verified\n"
    for name in list_files(folder):
        if name == MANIFEST:
            continue
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert inspect(folder, "--verify") == 1
        assert f"{folder / name}: content differs" in capsys.readouterr().out
        (folder / name).write_bytes(content)


def padding_fragment(folder: Path) -> tuple[Path, str]:
    """The file and the name of the fragment that holds the last row of the embedding's padding."""
    stored = StoredOptimizer(folder, read_checkpoint_manifest(folder))
    found = [
        (folder / part.file, sum(part.fragments[EMBEDDING]))
        for part in stored.index.parts
        if part.tp_rank == 1 and EMBEDDING in part.fragments
    ]
    return max(found, key=lambda each: each[1])[0], EMBEDDING


@pytest.mark.parametrize(
    ("slip", "message"),
    [
        ("rounded", f"{weights_file(1, 0)}: 1 of {TABLE[QKV].numel} elements of {QKV} are not the "
         "rounded master weights"),
        ("not finite", f"{weights_file(1, 0)}: {QKV} is not finite"),
        ("state", "/exp_avg is not finite"),
        ("shape", "/exp_avg has shape"),
        ("missing", "exp_avg"),
        ("weight", "final_layernorm.weight has 0 of 2 parts"),
        ("index", f"{OPTIMIZER_INDEX}: cannot be read"),
    ],
)  # fmt: skip
def test_what_hashes_do_not_see(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], slip: str, message: str
) -> None:
    """Written so and hashed so: whoever wrote it was wrong."""
    folder = make_checkpoint(tmp_path / "c", 2, "bf16")
    about, (file, name) = read_checkpoint_manifest(folder), padding_fragment(folder)
    tensors = load_file(file)
    match slip:
        case "rounded":
            change(folder / weights_file(1, 0), QKV, 0.5)
        case "not finite":
            change(folder / weights_file(1, 0), QKV, float("inf"))
        case "state":  # in the padding, which no weight has
            tensors[f"{name}/exp_avg"][-1] = float("nan")
            save_tensors(file, tensors)
        case "shape":
            tensors[f"{name}/exp_avg"] = torch.zeros(len(tensors[f"{name}/exp_avg"]) + 1)
            save_tensors(file, tensors)
        case "missing":
            del tensors[f"{name}/exp_avg"]
            save_tensors(file, tensors)
        case "weight":
            for rank in range(2):
                stage = load_file(folder / weights_file(1, rank))
                del stage["final_layernorm.weight"]
                save_tensors(folder / weights_file(1, rank), stage)
        case "index":
            (folder / OPTIMIZER_INDEX).write_text("{")
    signed_again(folder, about)
    assert inspect(folder, "--verify") == 1
    printed = capsys.readouterr()
    assert message in printed.out and str(folder) in printed.out and printed.err == ""


def test_differences_at_two_layouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def other(name: str) -> Tensor:
        value = drawn(name)
        if name == QKV:
            value[3, 5] += 0.25
        return value

    first = make_checkpoint(tmp_path / "a", 1)
    second = make_checkpoint(tmp_path / "b", 2, values=other, seed=1, run=run_record(phase="lm"))
    total = len(TABLE)
    assert inspect("--diff", first, first, "--optimizer") == 0
    assert capsys.readouterr().out == f"{3 * total} of {3 * total} are the same to the bit\n"
    assert inspect("--diff", first, second) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["tp_size: 1 -> 2", "phase: kd -> lm"] and len(lines) == 4
    norm = float(drawn(QKV).norm())
    assert lines[2] == f"{QKV}: differs by up to 0.25, {0.25 / norm:.3g} of its norm"
    assert lines[3] == f"{total - 1} of {total} are the same to the bit"
    found = {each.name: each for each in tensor_differences(first, second, with_optimizer=True)}
    assert {name for name, each in found.items() if not each.same} == {
        QKV, f"{QKV}/fp32", f"{QKV}/exp_avg",
    }  # fmt: skip
    assert len(found) == 3 * total
    # Settings of the run and of its DeepSpeed JSON; other precisions are never the same.
    longer = dataclasses.replace(
        run_record().config, train=dataclasses.replace(run_record().config.train, steps=9)
    )
    third = make_checkpoint(tmp_path / "c", 1, "bf16", run=run_record(config=longer))
    about = read_checkpoint_manifest(third)
    (third / "deepspeed.json").write_text(json.dumps({"train_batch_size": 16}))
    signed_again(third, about)
    assert inspect("--diff", first, third) == 1
    out = capsys.readouterr().out
    for line in ("precision: fp32 -> bf16", "train.steps: 5 -> 9", "train_batch_size: 8 -> 16"):
        assert f"{line}\n" in out
    assert f"\n0 of {total} are the same to the bit\n" in out
    (third / "deepspeed.json").write_text("[]")
    signed_again(third, about)
    assert inspect("--diff", first, third) == 2
    assert f"{third / 'deepspeed.json'}" in capsys.readouterr().err
    # Zeros of two signs are equal numbers and other bits.
    assert not any(
        each.same
        for each in tensor_differences(
            make_checkpoint(tmp_path / "d", values=lambda name: torch.zeros(TABLE[name].shape)),
            make_checkpoint(tmp_path / "e", values=lambda name: -torch.zeros(TABLE[name].shape)),
            with_optimizer=False,
        )
    )  # fmt: skip


def test_two_shapes_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (make_checkpoint(tmp_path / name) for name in "ab")
    about = read_checkpoint_manifest(second)
    (second / MANIFEST).unlink()
    write_model_manifest(
        second, dataclasses.replace(about.model, num_positions=9, vocab_size=20), about.training
    )
    assert inspect("--diff", first, second) == 2
    assert "vocab_size: 21 -> 20" in capsys.readouterr().err
    stripped = tmp_path / "c"
    rewrite_checkpoint(first, stripped, tp_size=None, pp_size=None, strip=True)
    assert inspect("--diff", first, stripped) == 0
    assert inspect("--diff", first, stripped, "--optimizer") == 2
    assert "no optimizer state (stripped?)" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("saved_tp", "tp", "pp"), [(2, 1, 1), (1, 2, 2), (2, 4, 1), (4, 2, 1)])
def test_rewritten_at_another_layout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], precision: str, saved_tp: int, tp: int,
    pp: int,
) -> None:  # fmt: skip
    source = make_checkpoint(tmp_path / "a", saved_tp, precision)
    before = bytes_of(source)
    target = tmp_path / "archive/b"
    assert inspect(source, "--to", target, "--tp", str(tp), "--pp", str(pp)) == 0
    assert bytes_of(source) == before and list(target.parent.iterdir()) == [target]
    assert f"layout: tp {tp}, pp {pp}, dp 1, ZeRO 1" in capsys.readouterr().out
    old, new = read_checkpoint_manifest(source), read_checkpoint_manifest(target)
    assert new.model == dataclasses.replace(old.model, tp_size=tp, pp_size=pp)
    assert old.training is not None and new.versions == old.versions
    assert new.training == dataclasses.replace(old.training, dp_size=1)
    ranks = [(stage, rank) for stage in range(pp) for rank in range(tp)]
    assert sorted(new.files) == sorted([
        "deepspeed.json", "tokenizer/tokenizer.model", OPTIMIZER_INDEX,
        *(weights_file(*each) for each in ranks), *map(optimizer_file, range(len(ranks))),
    ])  # fmt: skip
    weights, optimizer = WeightFiles(target, new), StoredOptimizer(target, new)
    for name in TABLE:
        assert torch.equal(weights.whole(name), WeightFiles(source, old).whole(name))
    for stage, rank in ranks:
        with safe_open(target / weights_file(stage, rank), "pt") as file:
            names = list(TABLE) if pp == 1 else STAGES[stage]
            assert set(file.keys()) == set(names)
            for name in names:
                expected = shard(drawn(name), TABLE[name], *cuts(tp)[rank])
                stored = file.get_tensor(name)
                assert torch.equal(stored, expected.to(DTYPES[precision])), name
                assert stored.dtype == DTYPES[precision]
    assert optimizer.index.scalars == {"step": 5.0}
    assert all(each.same for each in tensor_differences(source, target, with_optimizer=True))
    assert inspect(target, "--verify") == 0


def test_stripped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_checkpoint(tmp_path / "a", 2, "bf16")
    before = bytes_of(source)
    assert inspect(source, "--to", tmp_path / "b", "--strip-optimizer") == 0
    assert "optimizer: none" in (out := capsys.readouterr().out)
    assert out.endswith("(train.init_from); not to be resumed: no optimizer state\n")
    old, new = read_checkpoint_manifest(source), read_checkpoint_manifest(tmp_path / "b")
    kept = {name for name in before if not name.startswith("optimizer/")}
    assert set(list_files(tmp_path / "b")) == kept and not (tmp_path / "b/optimizer").exists()
    assert weights_fingerprint(new) == weights_fingerprint(old) and new.training == old.training
    with pytest.raises(ValueError, match="no optimizer state .stripped"):
        StoredOptimizer(tmp_path / "b", new)
    assert inspect(tmp_path / "b", "--verify") == 0
    both = ("--tp", "1", "--strip-optimizer")
    assert inspect(source, "--to", tmp_path / "c", *both) == 0
    assert inspect("--diff", source, tmp_path / "c") == 0
    assert inspect(tmp_path / "b", "--to", tmp_path / "d", "--tp", "4") == 0
    assert not (tmp_path / "d/optimizer").exists() and bytes_of(source) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "give a PATH"),
        ("{c} --diff {c} {c}", "give a PATH"),
        ("{c} --optimizer", "--optimizer belongs to --diff"),
        ("{c} --tp 0 --to {new}", "--tp 0: must be at least 1"),
        ("{c} --to {new}", "--to needs --tp, --pp or --strip-optimizer"),
        ("{c} --strip-optimizer", "need --to FOLDER"),
        ("{c} --to {new} --tp 2", "is at tp 2, pp 2 already"),
        ("{c} --to {new} --tp 3", "num_attention_heads = 4 is not divisible by"),
        ("{c} --to {new} --pp 3", "2 layers cannot fill 3 pipeline stages"),
        ("{c} --to {c} --tp 1", "is there already: name another folder"),
        ("{c} --to {c}/archive --tp 1", "which is left as it is"),
        ("{place} --verify", "holds no complete checkpoint"),
        ("{place}/none", "does not exist"),
        ("--diff {c} {place}", "--diff = "),
    ],
)
def test_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    folder = make_checkpoint(tmp_path / "c", 2)
    before = bytes_of(folder)
    places = {"c": folder, "new": tmp_path / "new", "place": tmp_path}
    assert inspect(*words.format(**places).split()) == 2
    assert message in capsys.readouterr().err
    assert bytes_of(folder) == before and [*tmp_path.iterdir()] == [folder]


@pytest.mark.parametrize("words", ["--tp 1", "--strip-optimizer"])
def test_what_is_damaged_is_not_rewritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    folder = make_checkpoint(tmp_path / "c", 2)
    change(folder / weights_file(0, 0), EMBEDDING, 0.5)
    assert inspect(folder, "--to", tmp_path / "new", *words.split()) == 2
    assert f"{weights_file(0, 0)}: content differs" in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == [folder]


def test_what_is_not_read_back_as_written_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path / "c", 2)

    def wrong(path: Path, tensors: dict[str, Tensor]) -> None:
        key = f"{QKV}/exp_avg"
        tensors |= {key: -tensors[key]} if key in tensors else {}
        save_tensors(path, tensors)

    monkeypatch.setattr("megatron_salt.checkpoint.inspection.save_tensors", wrong)
    assert inspect(folder, "--to", tmp_path / "new", "--pp", "1") == 2
    assert f"{QKV}/exp_avg is not what was written" in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == [folder]
