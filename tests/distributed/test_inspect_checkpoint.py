"""A run's checkpoint, looked into and rewritten at layouts that no run has had: it is good, holds
the same to the bit, and goes on as the run itself did."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from commands import call, run_forked
from conftest import VOCAB_SIZE
from elastic import LAYOUTS, SAVED, TOLERANCE, At, Pairs
from tiny import cut_back

from megatron_salt.checkpoint.folder import list_checkpoints
from megatron_salt.checkpoint.manifest import read_checkpoint_manifest, weights_fingerprint


# (the layout to rewrite it at, the layout to go on at)
@pytest.mark.parametrize(
    ("precision", "model", "saved_at", "moves"),
    [
        ("bf16", "gpt", LAYOUTS[2],
         [(At(2, 1, 1, 1), At(2, 1, 1, 1)), (At(1, 4, 1, 1), LAYOUTS[2])]),
        ("fp32", "llama", LAYOUTS[7], [(At(2, 2, 1, 1), LAYOUTS[7])]),
    ],
)  # fmt: skip
def test_rewritten_and_resumed(
    dataset: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    precision: str, model: str, saved_at: At, moves: list[tuple[At, At]],
) -> None:  # fmt: skip
    pairs = Pairs(tmp_path, dataset, teacher, precision, model, VOCAB_SIZE)
    saved = pairs.save(saved_at)
    assert call("inspect-checkpoint", saved.folder, "--verify") == 0
    source = saved.folder / f"checkpoints/step_{SAVED:08d}"
    for at, now in moves:
        made = tmp_path / f"made_{at.tp}_{at.pp}"
        layout = ("--tp", str(at.tp), "--pp", str(at.pp))
        assert call("inspect-checkpoint", source, "--to", made, *layout) == 0
        assert call("inspect-checkpoint", made, "--verify") == 0
        capsys.readouterr()
        assert call("inspect-checkpoint", "--diff", source, made, "--optimizer") == 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.split()[0] == last.split()[2] != "0"
        # Back at the run's layout its files of weights are those that the run wrote.
        back = tmp_path / f"back_{at.tp}_{at.pp}"
        layout = ("--tp", str(saved_at.tp), "--pp", str(saved_at.pp))
        assert call("inspect-checkpoint", made, "--to", back, *layout) == 0
        identities = [
            weights_fingerprint(read_checkpoint_manifest(x)) for x in (source, made, back)
        ]
        assert identities[0] == identities[2] != identities[1]
        # The run as it was after this step, with the rewritten checkpoint in the place of its own.
        archived = tmp_path / f"run_{at.tp}_{at.pp}"
        cut_back(saved.folder, archived, SAVED)
        own = list_checkpoints(archived)[-1]
        shutil.rmtree(own)
        shutil.copytree(made, own)
        (pair,) = pairs.resume(now, [saved._replace(folder=archived)])
        assert pair.same_state and pair.worst_loss <= TOLERANCE[precision]
        if now == saved_at:  # to the bit what the run itself did
            assert pair.worst_loss == 0.0 and pair.same_end


def test_what_is_left_of_a_stripped_one(teacher: Path, tmp_path: Path) -> None:
    """It is scored as the whole one is, and so is one at another layout."""
    (source,) = list_checkpoints(teacher)
    for name, words in (("stripped", ["--strip-optimizer"]), ("stages", ["--pp", "2"])):
        assert call("inspect-checkpoint", source, "--to", tmp_path / name, *words) == 0
    done = run_forked(
        "-m", "megatron_salt", "evaluate", "--samples", "2", "--output", str(tmp_path / "scores"),
        "--checkpoint", str(source), str(tmp_path / "stripped"), str(tmp_path / "stages"),
        folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "scores").read_text())
    assert len(scores) == 3 and len({each["valid_ce_nats"] for each in scores}) == 1
