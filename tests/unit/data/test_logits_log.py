"""Logits that a training model writes: what is joined is what each window's last step said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_logits import make_settings
from tiny_tags import write_indexed

from megatron_salt.data.logits import (
    LogitsOrigin,
    StoredLogits,
    encode_logits,
    logits_manifest_path,
    verify_logits,
)
from megatron_salt.data.logits_log import LogitsLog, join_logs
from megatron_salt.data.tags import DataIdentity, ModelIdentity

WINDOW, NUM_WINDOWS, KEPT = 16, 150, 8
SETTINGS = make_settings(encoding="fp32")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("data") / "text"
    write_indexed(prefix, [np.arange(WINDOW * NUM_WINDOWS + 5, dtype=np.uint16) % 509])
    return prefix


def said(step: int, windows: Any) -> dict[str, np.ndarray]:
    """What the model says of windows at a step: another number of tokens at every place."""
    parts = []
    for window in np.asarray(windows):
        random = np.random.default_rng([step, int(window)])
        logp = -np.sort(random.exponential(2.0, (WINDOW, KEPT)), axis=1).astype(np.float32)
        logp[np.arange(KEPT) >= random.integers(1, KEPT + 1, (WINDOW, 1))] = -np.inf
        scalars = random.normal(size=(3, WINDOW)).astype(np.float32)
        parts.append((random.integers(0, 509, logp.shape).astype(np.int32), logp, *scalars))
    ids, logp, rest, entropy, loss = (np.concatenate(each) for each in zip(*parts, strict=True))
    return {"ids": ids, "logp": logp, "rest": rest, "entropy": entropy, "loss": loss}


def write(log: LogitsLog, step: int, windows: Any) -> None:
    of = said(step, windows)
    of_token = {name: of[name] for name in ("rest", "entropy", "loss")}
    log.write(step, np.asarray(windows), encode_logits(SETTINGS, of["ids"], of["logp"], of_token))


def joined(prefix: Path, data: Path) -> StoredLogits:
    origin = LogitsOrigin(
        data=DataIdentity.of(data), tokenizer_fingerprint="tok", planned_steps=4, settings=SETTINGS,
        model=ModelIdentity(fingerprint="weights", step=0, name="large"),
    )  # fmt: skip
    join_logs(str(prefix), sorted(prefix.parent.glob("rank_*")), origin, {})
    return StoredLogits(prefix, verify_logits(prefix, data, "tok", hashes=True), top_k=None)


def check(stored: StoredLogits, step_of: dict[int, int]) -> None:
    for windows in (list(step_of), sorted(step_of)):
        places = np.concatenate([np.arange(w * WINDOW, (w + 1) * WINDOW) for w in windows])
        found = {k: v.numpy() for k, v in stored.of_places(places).items()}
        of = [said(step_of[w], [w]) for w in windows]
        present = found["logits_logp"] > -np.inf
        for name in ("logp", "entropy", "loss", "rest"):
            expected = np.concatenate([each[name] for each in of])
            np.testing.assert_array_equal(found[f"logits_{name}"], expected, err_msg=name)
        ids = np.concatenate([each["ids"] for each in of])
        np.testing.assert_array_equal(found["logits_ids"][present], ids[present])


def test_a_windows_last_step_counts_and_a_resumed_run_writes_again(
    data: Path, tmp_path: Path
) -> None:
    order = np.random.default_rng(5).permutation(NUM_WINDOWS)
    parts = [tmp_path / "rank_00000", tmp_path / "rank_00001"]
    logs = [LogitsLog(folder, SETTINGS, "run", 0) for folder in parts]
    step_of: dict[int, int] = {}
    for step in range(3):
        for rank, log in enumerate(logs):
            windows = order[step * 40 + rank * 20 : step * 40 + (rank + 1) * 20]
            if step == 2:  # the second epoch: some for the second time, by another rank
                windows = order[rank * 20 + 10 : rank * 20 + 30]
            write(log, step, windows)
            step_of |= dict.fromkeys(windows.tolist(), step)
    # Killed while writing step 3, resumed at step 2: that one is written again.
    write(logs[0], 3, order[100:110])
    with (parts[1] / "log_ids.bin").open("ab") as file:
        file.write(b"half a step")
    with (parts[1] / "index.bin").open("ab") as file:
        file.write(b"half")
    for rank, log in enumerate(logs):
        log.close()
        log = LogitsLog(parts[rank], SETTINGS, "run", 2)
        write(log, 2, order[rank * 20 + 10 : rank * 20 + 30])
        log.close()
    stored = joined(tmp_path / "own", data)
    check(stored, step_of)
    assert not list(tmp_path.glob("rank_*"))
    steps = np.fromfile(tmp_path / "own_steps.bin", "<i4")
    windows = np.fromfile(tmp_path / "own_windows.bin", "<i8")
    assert dict(zip(windows.tolist(), steps.tolist(), strict=True)) == step_of
    absent = int(order[-1]) * WINDOW
    with pytest.raises(ValueError, match=rf"own_windows\.bin: window {order[-1]} is not stored"):
        stored.of_places(np.array([absent]))


def test_what_cannot_be_is_refused(data: Path, tmp_path: Path) -> None:
    log = LogitsLog(tmp_path / "rank_0", SETTINGS, "run", 0)
    write(log, 0, [3, 1])
    log.close()
    (tmp_path / "rank_0" / "log_rest.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"log_rest\.bin has 0 bytes, its index says 128"):
        LogitsLog(tmp_path / "rank_0", SETTINGS, "run", 1)
    with pytest.raises(ValueError, match=r"log_rest\.bin: ends before its index"):
        joined(tmp_path / "own", data)
    assert not logits_manifest_path(tmp_path / "own").exists()
    LogitsLog(tmp_path / "rank_0", SETTINGS, "run", 0).close()
    with pytest.raises(ValueError, match="no step has written logits"):
        joined(tmp_path / "own", data)


def test_a_log_is_one_runs_with_its_settings(tmp_path: Path) -> None:
    """With fewer tokens a position its files would be cut where nothing ends; and a run that begins
    anew must not drop what another has written."""
    log = LogitsLog(tmp_path / "rank_0", SETTINGS, "run", 0)
    write(log, 0, [3, 1])
    log.close()
    size = (tmp_path / "rank_0" / "log_ids.bin").stat().st_size
    for settings, run in ((make_settings(encoding="fp32", top_k=4), "run"), (SETTINGS, "other")):
        with pytest.raises(ValueError, match="rank_0 holds logits of another run, or of other set"):
            LogitsLog(tmp_path / "rank_0", settings, run, 0)
    assert (tmp_path / "rank_0" / "log_ids.bin").stat().st_size == size > 0
