"""Reports on hand-written metrics, whose crossings, savings and errors are known beforehand."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import ROOT, call
from matplotlib import rc_context
from matplotlib.image import imread

from megatron_salt.report import load_run, markdown, plots, with_labels, write_report
from megatron_salt.report.markdown import describe_machine
from megatron_salt.report.runs import find_crossing, find_teachers, group_by_label

REPO = ROOT


@pytest.fixture(autouse=True)
def plots_only_where_asked_for(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawing takes most of a report's time; one test looks at what is drawn."""
    if request.node.originalname != "test_plots_exist_are_linked_and_show_something":
        monkeypatch.setattr(markdown, "_save", lambda figure, path: path.touch())


PLOTS = ("heldout-steps", "heldout-time", "kd-weight", "train-ce", "step-time")


def make_rows(
    heldout: dict[int, float],
    *,
    num_steps: int = 100,
    kd_steps: int = 0,
    step_time_s: Callable[[int], float] = lambda step: 1.0,
    teacher_ce: float | None = None,
    valid_tokens: int = 1000,
) -> list[dict[str, Any]]:
    """Metrics lines of a run whose held-out loss after a step is `heldout[step]`."""
    rows: list[dict[str, Any]] = []
    for step in range(num_steps + 1):
        if step == 0:
            row: dict[str, Any] = {"step": 0, "tokens": 0}
        else:
            is_kd = step <= kd_steps
            row = {
                "step": step,
                "phase": "kd" if is_kd else "lm",
                "ce_nats": 5.0 - 0.01 * step,
                "kl_nats": 1.0 if is_kd else None,
                "kd_weight": 0.5 if is_kd else 0.0,
                "loss": 5.0,
                "lr": 1e-3,
                "grad_norm": 1.0,
                "tokens": 64 * step,
                "step_time_s": step_time_s(step),
                "tokens_per_s": 64.0,
                "teacher_time_s": 0.25 if is_kd else None,
            }
        if step in heldout:
            row |= {
                "valid_ce_nats": heldout[step],
                "valid_accuracy": 0.25,
                "valid_tokens": valid_tokens,
            }
            if teacher_ce is not None:
                row["teacher_valid_ce_nats"] = teacher_ce
        if step > 0 or 0 in heldout:
            rows.append(row)
    return rows


def write_run(
    directory: Path, rows: Sequence[dict[str, Any]], held_out: str | None = "0123abcd"
) -> Path:
    """A run's folder; its last checkpoint names the held-out samples, unless that is None."""
    directory.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "metrics.jsonl").write_text(text)
    for step, evaluation in ((50, "of an older evaluation"), (100, held_out)):
        folder = directory / "checkpoints" / f"step_{step:08d}"
        if held_out is not None:
            folder.mkdir(parents=True, exist_ok=True)
            manifest = {"model": {"evaluation": {"data": evaluation}}, "files": {}}
            (folder / "manifest.json").write_text(json.dumps(manifest))
    return directory


@pytest.fixture
def baseline(tmp_path: Path) -> Path:
    """4 -> 3 nats/token in 100 steps of 1 s."""
    return write_run(tmp_path / "plain", make_rows({0: 6.0, 50: 4.0, 100: 3.0}))


@pytest.fixture
def salt(tmp_path: Path) -> Path:
    """3.5 at step 50, 2.5 at step 100, so 3.0 at step 75; the 40 KD steps take 1.5 s each."""
    rows = make_rows(
        {0: 6.0, 50: 3.5, 100: 2.5},
        kd_steps=40,
        step_time_s=lambda step: 1.5 if step <= 40 else 1.0,
        teacher_ce=3.75,
    )
    return write_run(tmp_path / "salt", rows)


def table_row(text: str, label: str) -> list[str]:
    """The cells after the label in the first table row that starts with it."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {label} "))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


# ---- reading and measuring ----


def test_load_run_reads_arrays_evaluations_and_phases(salt: Path) -> None:
    run = load_run(salt)
    assert run.label == "salt"
    assert (run.num_steps, run.num_kd_steps, run.num_tokens) == (100, 40, 6400)
    assert [e.step for e in run.evaluations] == [0, 50, 100]
    for seconds in (run.median_s, run.summed_s):
        assert [seconds[e.step] for e in run.evaluations] == [0.0, 70.0, 120.0]
    assert run.teacher_ce_nats == 3.75
    assert math.isnan(run.teacher_time_s[-1])
    assert run.best.step == 100


def test_a_run_may_start_without_step_0(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", make_rows({100: 3.0})), "named")
    assert run.label == "named"
    assert [e.step for e in run.evaluations] == [100]


@pytest.mark.parametrize(
    ("target", "step", "seconds", "evaluation_step"),
    [
        (3.0, 75.0, 95.0, 100),  # half-way between 3.5 and 2.5; 40 · 1.5 s + 35 · 1 s
        (3.5, 50.0, 70.0, 50),  # exactly at an evaluation: nothing to interpolate
        (5.0, 20.0, 30.0, 50),  # within the KD phase: seconds follow its own step times
        (6.5, 0.0, 0.0, 0),  # already there at the first evaluation
    ],
)
def test_crossing_is_interpolated_between_evaluations(
    salt: Path, target: float, step: float, seconds: float, evaluation_step: int
) -> None:
    crossing = find_crossing(load_run(salt), target)
    assert crossing is not None
    assert crossing.step == pytest.approx(step)
    assert crossing.median_s == pytest.approx(seconds)
    assert crossing.summed_s == pytest.approx(seconds)
    assert crossing.evaluation_step == evaluation_step


def test_crossing_is_the_first_one_and_may_not_exist(tmp_path: Path) -> None:
    heldout = {0: 6.0, 20: 4.0, 40: 2.0, 60: 4.0, 80: 2.0}
    run = load_run(write_run(tmp_path / "run", make_rows(heldout)))
    crossing = find_crossing(run, 3.0)
    assert crossing is not None and crossing.step == pytest.approx(30.0)
    assert find_crossing(run, 1.999) is None


def test_one_slow_step_changes_the_sum_but_not_the_saving(
    baseline: Path, salt: Path, tmp_path: Path
) -> None:
    """As on a shared machine: the tenth step of the KD phase waits 500 s for somebody else."""

    def seconds(step: int) -> float:
        return 501.5 if step == 10 else 1.5 if step <= 40 else 1.0

    heldout = {0: 6.0, 50: 3.5, 100: 2.5}
    rows = make_rows(heldout, kd_steps=40, step_time_s=seconds, teacher_ce=3.75)
    runs = [
        load_run(baseline),
        load_run(salt),
        load_run(write_run(tmp_path / "disturbed", rows)),
    ]
    _, crossings = write_report(runs, tmp_path / "report.md", title="T").split("\n\n")
    quiet, disturbed = table_row(crossings, "salt"), table_row(crossings, "disturbed")
    assert quiet == ["100", "75.0", "25.0 %", "95.0", "5.0 %", "95.0", "5.0 %"]
    assert disturbed == ["100", "75.0", "25.0 %", "95.0", "5.0 %", "595.0", "-495.0 %"]


def test_teachers_that_are_the_same_share_a_line(tmp_path: Path) -> None:
    def run(name: str, teacher_ce: float | None) -> Any:
        return load_run(write_run(tmp_path / name, make_rows({100: 3.0}, teacher_ce=teacher_ce)))

    plain, a, b, c = run("plain", None), run("a", 3.5), run("b", 3.5), run("c", 3.25)
    own = load_run(write_run(tmp_path / "teacher", make_rows({50: 3.9, 100: 3.6})))
    assert find_teachers([plain], None) == {}
    assert find_teachers([plain], own) == {"teacher": 3.6}  # the end of its own run
    assert find_teachers([plain, a, b], own) == {"teacher": 3.5}  # measured within a run
    assert find_teachers([plain, a, c], None) == {"teacher of a": 3.5, "teacher of c": 3.25}


# ---- the report ----


def test_report_tables_are_as_computed_by_hand(baseline: Path, salt: Path, tmp_path: Path) -> None:
    # Reaches 3.0 only at step 150 and 300 s: both savings are negative.
    slow = make_rows({100: 4.0, 200: 2.0}, num_steps=200, step_time_s=lambda step: 2.0)
    never = make_rows({50: 5.0, 100: 3.01})
    runs = [
        load_run(baseline),
        load_run(salt, "SALT|40"),
        load_run(write_run(tmp_path / "slow", slow)),
        load_run(write_run(tmp_path / "never", never)),
    ]
    output = tmp_path / "out" / "report.md"
    stdout = write_report(runs, output, title="By hand")
    text = output.read_text()
    assert text.startswith("# By hand\n")
    assert stdout.split("\n\n")[0] in text and stdout.split("\n\n")[1] in text

    results, crossings = stdout.split("\n\n")
    assert table_row(results, "plain") == [
        *("3.0000", "25.00 %", "3.0000 (100)", "100", "100", "6,400", "100.0", "100.0")
    ]
    assert table_row(results, "slow")[3] == "200"  # the teacher's 3.75 lies after 4.0 of step 100
    assert table_row(results, "*teacher*")[0] == "3.7500"
    assert table_row(crossings, "plain") == ["100", "100.0", "", "100.0", "", "100.0", ""]
    salt_line = next(line for line in crossings.splitlines() if line.startswith(r"| SALT\|40"))
    assert "| 100 |" in " ".join(salt_line.split())
    assert "75.0 | 25.0 % | 95.0 | 5.0 % | 95.0 | 5.0 %" in " ".join(salt_line.split())
    assert table_row(crossings, "slow") == [
        *("200", "150.0", "-50.0 %", "300.0", "-200.0 %", "300.0", "-200.0 %")
    ]
    assert table_row(crossings, "never") == [
        *("not reached", "not reached", "", "not reached", "", "", "")
    ]

    step_times = text[text.index("## Step times") :]
    salt_line = next(line for line in step_times.splitlines() if line.startswith(r"| SALT\|40"))
    assert " ".join(salt_line.split()) == (
        r"| SALT\|40 | 40 | 1,500.0 | 1,500.0 | 1.500 | 250.0 |"
        r" 60 | 1,000.0 | 1,000.0 | 1.000 |"
    )
    assert table_row(step_times, "slow") == [
        *("0", "", "", "", "", "200", "2,000.0", "2,000.0", "2.000")
    ]


def test_report_names_machine_and_versions_but_no_paths(
    baseline: Path, salt: Path, tmp_path: Path
) -> None:
    for run, layers, teacher in ((baseline, 4, None), (salt, 6, f"{tmp_path}/slm")):
        config = {
            "model": {"num_layers": layers, "hidden_size": 96},
            "teacher": {"checkpoint": teacher},
            "salt": {"selection": [f"{tmp_path}/hard.parquet"] if teacher else []},
            "train": {"output_dir": str(run)},
        }
        (run / "config.json").write_text(json.dumps(config))
        (run / "deepspeed.json").write_text(json.dumps({"optimizer": {"params": {"lr": layers}}}))
    output = tmp_path / "report.md"
    write_report([load_run(baseline), load_run(salt)], output, title="T")
    text = output.read_text()
    settings = text[text.index("## Settings that differ") :]
    assert table_row(settings, "run") == [
        *("`model.num_layers`", "`teacher.checkpoint`", "`salt.selection`"),
        "`deepspeed.optimizer.params.lr`",
    ]
    assert table_row(settings, "plain") == ["4", "none", "none", "4"]
    assert table_row(settings, "salt") == ["6", "slm", "hard.parquet", "6"]
    for needed in ("torch ", "megatron-core ", "deepspeed ", "Python ", "one seed", "shared"):
        assert needed in text
    assert describe_machine() in text
    assert str(tmp_path) not in text
    assert "1,000 tokens" in text


def test_settings_that_are_alike_make_no_table(baseline: Path, salt: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.md"
    for run in (baseline, salt):
        (run / "config.json").write_text(json.dumps({"train": {"output_dir": str(run), "seed": 1}}))
    write_report([load_run(baseline), load_run(salt)], output, title="T")
    assert "## Settings" not in output.read_text()


def test_paths_show_as_many_parts_as_tell_them_apart(
    baseline: Path, salt: Path, tmp_path: Path
) -> None:
    for run, folder, tags in ((baseline, "a", "x/one"), (salt, "b", "x/two")):
        data = {
            "train_data_path": [0.5, f"{tmp_path}/{folder}/text"],
            "tags": [f"{tmp_path}/{tags}"],
        }
        (run / "config.json").write_text(json.dumps({"data": data}))
    output = tmp_path / "report.md"
    write_report([load_run(baseline), load_run(salt)], output, title="T")
    text = output.read_text()
    settings = text[text.index("## Settings that differ") :]
    assert table_row(settings, "plain") == ["0.5 a/text", "one"]
    assert table_row(settings, "salt") == ["0.5 b/text", "two"]
    assert str(tmp_path) not in text


def write_seed(directory: Path, seed: int, heldout: dict[int, float], **options: Any) -> Path:
    write_run(directory, make_rows(heldout, **options))
    (directory / "config.json").write_text(json.dumps({"train": {"seed": seed}}))
    return directory


@pytest.fixture
def seeds(tmp_path: Path) -> list[Path]:
    """Two baselines, then two runs that end 0.5 and 0.1 nats below the baseline of their seed."""
    return [
        write_seed(tmp_path / "plain-1", 1, {0: 6.0, 100: 3.0}),
        write_seed(tmp_path / "plain-2", 2, {0: 6.0, 100: 3.2}),
        write_seed(tmp_path / "salt-1", 1, {0: 6.0, 50: 3.5, 100: 2.5}, kd_steps=40),
        write_seed(tmp_path / "salt-2", 2, {0: 6.0, 50: 3.3, 100: 3.1}, kd_steps=40),
    ]


def test_seeds_of_a_label_are_averaged_and_paired(seeds: list[Path], tmp_path: Path) -> None:
    labels = ("plain", "plain", "SALT", "SALT")
    runs = [load_run(*pair) for pair in zip(seeds, labels, strict=True)]
    text = write_report(runs, tmp_path / "report.md", title="T")
    means, results, crossings = text.split("\n\n")
    assert table_row(means, "plain") == ["2", "3.1000 (3.0000 to 3.2000)", "", "", ""]
    assert table_row(means, "SALT") == [
        "2",
        "2.8000 (2.5000 to 3.1000)",
        "-0.3000 (-0.5000 to -0.1000)",
        "25.0 % (25.0 % to 25.0 %)",
        "25.0 % (25.0 % to 25.0 %)",
    ]
    assert table_row(results, "plain, seed 2")[0] == "3.2000"
    assert table_row(crossings, "SALT, seed 2")[1:3] == ["75.0", "25.0 %"]
    # Every arm has the same seeds: they are no difference between the arms.
    assert "## Settings that differ" not in (tmp_path / "report.md").read_text()


def test_runs_that_differ_in_their_seed_alone_are_one_setting(seeds: list[Path]) -> None:
    for path in seeds:  # of two settings
        settings = {"seed": int(path.name[-1]), "output_dir": str(path)}
        text = json.dumps({"train": settings, "salt": {"kd_steps": 40 * ("salt" in path.name)}})
        (path / "config.json").write_text(text)
    runs = [load_run(path) for path in seeds]

    def labels(num_baselines: int, *given: str) -> list[str]:
        return [run.label for run in with_labels(runs, num_baselines, given)]

    assert labels(2) == ["plain-1", "plain-1", "salt-1", "salt-1"]
    assert labels(2, "baseline", "SALT") == ["baseline", "baseline", "SALT", "SALT"]
    assert labels(2, "SALT", "SALT") == ["plain-1", "plain-1", "SALT", "SALT"]
    assert labels(2, "a", "b", "c", "d") == ["a", "b", "c", "d"]
    # Without their settings, or with one seed twice, they are settings of their own.
    assert labels(1) == ["plain-1", "plain-2", "salt-1", "salt-1"]
    runs[3] = runs[2]
    with pytest.raises(ValueError, match="folders called salt-1 hold runs of different settings"):
        labels(2)
    assert labels(2, "one", "two") == ["plain-1", "plain-1", "one", "two"]
    with pytest.raises(ValueError, match=r"3 labels for 4 runs of 3 settings: give one for each"):
        labels(2, "a", "a", "b")


def test_seeds_of_other_lengths_have_no_mean(seeds: list[Path], tmp_path: Path) -> None:
    longer = write_seed(tmp_path / "longer", 2, {0: 6.0, 120: 3.1}, num_steps=120)
    runs = [load_run(path, "plain") for path in (seeds[0], longer)]
    with pytest.raises(ValueError, match="called plain are of 100, 120 steps"):
        write_report([*runs, load_run(seeds[2])], tmp_path / "report.md", title="T")


def test_seeds_that_are_not_every_arms_are_a_setting(seeds: list[Path], tmp_path: Path) -> None:
    runs = [load_run(seeds[0], "plain"), load_run(seeds[2], "A"), load_run(seeds[3], "B")]
    write_report(runs, tmp_path / "report.md", title="T")
    settings = (tmp_path / "report.md").read_text()
    assert table_row(settings[settings.index("## Settings that differ") :], "B") == ["2"]


def test_a_seed_that_does_not_get_there_is_not_averaged_away(
    seeds: list[Path], tmp_path: Path
) -> None:
    seeds[3] = write_seed(tmp_path / "salt-2", 2, {0: 6.0, 100: 3.3}, kd_steps=40)
    labels = ("plain", "plain", "SALT", "SALT")
    runs = [load_run(*pair) for pair in zip(seeds, labels, strict=True)]
    means, _, _ = write_report(runs, tmp_path / "report.md", title="T").split("\n\n")
    assert table_row(means, "SALT")[2:] == ["-0.2000 (-0.5000 to +0.1000)", "1 of 2 there", ""]


def test_seeds_without_a_baseline_of_theirs_are_refused(seeds: list[Path], tmp_path: Path) -> None:
    other = write_seed(tmp_path / "salt-3", 3, {0: 6.0, 100: 3.0})
    runs = [load_run(seeds[0], "plain"), load_run(seeds[1], "plain"), load_run(other)]
    with pytest.raises(ValueError, match=r"salt-3 has train\.seed 3, the baselines have 1, 2"):
        write_report(runs, tmp_path / "report.md", title="T")


OTHER_TEXT = (
    ("beef", 1000, "beef, 1,000 tokens"),
    (None, 999, "fingerprint unknown, 999 tokens"),
)


@pytest.mark.parametrize(("held_out", "number", "text"), OTHER_TEXT)
def test_losses_on_other_text_are_not_compared(
    baseline: Path, salt: Path, tmp_path: Path, held_out: str | None, number: int, text: str
) -> None:
    rows = make_rows({0: 6.0, 100: 2.0}, valid_tokens=number, teacher_ce=1.0)
    other = load_run(write_run(tmp_path / "other", rows, held_out))
    own = load_run(write_run(tmp_path / "slm", make_rows({100: 3.8}, valid_tokens=number), "beef"))
    runs = [load_run(baseline), load_run(salt), other]
    printed = write_report(runs, tmp_path / "report.md", title="T", teacher_run=own)
    results, crossings, *notes = printed.split("\n\n")
    assert table_row(results, "other †")[:2] == ["2.0000", "25.00 %"]
    assert table_row(results, "other †")[3] == "-"
    assert table_row(results, "salt")[3] == "50"
    # Its own measurement of the teacher is not that of the others.
    assert table_row(results, "*teacher*")[0] == "3.7500" and "teacher of" not in results
    assert table_row(results, "*slm, its own run* †")[0] == "3.8000"
    assert table_row(crossings, "other †") == ["-", "-", "", "-", "", "", ""]
    assert table_row(crossings, "salt")[1] == "75.0"
    where = "0123abcd, 1,000 tokens"
    assert notes[0].startswith(f"**other †: other held-out text** ({text})")
    assert f"the baseline's ({where})" in notes[0]
    assert notes[1].startswith("**slm †: other held-out text** (beef")
    written = (tmp_path / "report.md").read_text()
    assert all(note in written[: written.index("## Results")] for note in notes)
    assert [len(notes), "not checked" in printed] == ([3, True] if held_out is None else [2, False])


def test_a_teachers_run_on_other_text_gives_no_loss(baseline: Path, tmp_path: Path) -> None:
    own = load_run(write_run(tmp_path / "slm", make_rows({100: 3.8}), "beef"))
    assert find_teachers([load_run(baseline)], own) == {}


def test_text_that_cannot_be_checked_is_said(baseline: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", make_rows({100: 2.5}), held_out=None)
    runs = [load_run(baseline), load_run(other)]
    _, crossings, note = write_report(runs, tmp_path / "report.md", title="T").split("\n\n")
    assert note.startswith("**Held-out text not checked**: no checkpoint says on which text other")
    assert table_row(crossings, "other")[1] == "100.0"
    manifest = baseline / "checkpoints" / "step_00000100" / "manifest.json"
    manifest.write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json: cannot be read: .*Restore or delete"):
        load_run(baseline)


def test_seeds_on_other_text_have_no_difference(seeds: list[Path], tmp_path: Path) -> None:
    write_seed(tmp_path / "salt-2", 2, {0: 6.0, 100: 3.1}, kd_steps=40, valid_tokens=7)
    labels = ("plain", "plain", "SALT", "SALT")
    runs = [load_run(*pair) for pair in zip(seeds, labels, strict=True)]
    means = write_report(runs, tmp_path / "report.md", title="T").split("\n\n")[0]
    assert table_row(means, "SALT †")[2:] == ["-", "-", "-"]


def test_losses_by_dataset_stand_beside_the_baselines(tmp_path: Path) -> None:
    runs = []
    for name, python, git in (("plain", 3.0, 4.0), ("salt", 2.5, 4.25), ("old", None, None)):
        rows = make_rows({0: 6.0, 100: 3.0})
        rows[0] |= {"valid_ce_nats/python": 9.0, "valid_ce_nats/git": None}
        if python is not None:
            rows[-1] |= {"valid_ce_nats/python": python, "valid_ce_nats/git": git}
        runs.append(load_run(write_run(tmp_path / name, rows)))
    _, table, _ = write_report(runs, tmp_path / "report.md", title="T").split("\n\n")
    assert table_row(table, "run") == [
        f"{name}, nats/token (minus the baseline's)" for name in ("python", "git")
    ]
    assert table_row(table, "plain") == ["3.0000", "4.0000"]
    assert table_row(table, "salt") == ["2.5000 (-0.5000)", "4.2500 (+0.2500)"]
    assert table_row(table, "old") == ["", ""]
    assert table in (tmp_path / "report.md").read_text()


def test_plots_exist_are_linked_and_show_something(
    baseline: Path, salt: Path, tmp_path: Path
) -> None:
    output = tmp_path / "salt.md"
    write_report([load_run(baseline), load_run(salt)], output, title="T")
    text = output.read_text()
    for name in PLOTS:
        assert f"(salt-{name}.png)" in text
        pixels = (255 * imread(tmp_path / f"salt-{name}.png")[..., :3]).round().astype(np.int32)
        assert min(pixels.shape[:2]) > 200, name
        colours = pixels @ np.array([1 << 16, 1 << 8, 1])
        assert len(np.unique(colours)) > 20, name
        assert (colours == 0x0072B2).sum() > 50, f"{name} does not show the run in its colour"


def test_eight_runs_can_be_told_apart(tmp_path: Path) -> None:
    """Each has its own colour and marker, the axes keep their size below a tall legend, and curves
    that are equal are marked in turn."""
    names = ["plain", *(f"arm number {n}" for n in range(8))]
    kd_steps = [0, *[40] * 8]
    runs = [
        load_run(write_run(tmp_path / name, make_rows({0: 6.0, 100: 3.0}, kd_steps=kd)))
        for name, kd in zip(names, kd_steps, strict=True)
    ]
    heights, places = [], []
    for count in (2, 9):
        with rc_context(plots.PLOT_STYLE):
            figure = plots.plot_kd_weight(group_by_label(runs[:count]))
            figure.draw_without_rendering()
        (ax,) = figure.axes
        heights.append(ax.get_window_extent().height)
        assert ax.yaxis.get_label().get_window_extent().y0 >= 0
    lines = [line for line in ax.get_lines() if not str(line.get_label()).startswith("_")]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 9
    assert len({line.get_color() for line in lines}) == 9
    assert heights[1] > 0.85 * heights[0]
    for line in lines[1:]:
        start, every = line.get_markevery()
        places.append(set(range(start, 101, every)))
        assert line.get_drawstyle() == "steps-post"
        # Step 40 is the last one with a teacher, and the curve falls where it ends.
        x, y = line.get_data()
        assert (y[39], y[40]) == (0.5, 0.0) and x[40] == 40
    assert not set.intersection(*places) and all(len(one) > 3 for one in places)
    assert sum(map(len, places)) == len(set.union(*places))


def test_equal_labels_are_refused(baseline: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="labels must differ.*--label"):
        write_report([load_run(baseline)] * 2, tmp_path / "report.md", title="T")


# ---- broken files ----


def break_rows(change: Callable[[list[dict[str, Any]]], Any]) -> list[dict[str, Any]]:
    rows = make_rows({0: 6.0, 10: 3.0}, num_steps=10, kd_steps=3)
    change(rows)
    return rows


@pytest.mark.parametrize(
    ("change", "line", "says"),
    [
        (lambda rows: rows.insert(5, dict(rows[4])), 6, "step 4 where step 5 was expected"),
        (lambda rows: rows.insert(8, dict(rows[2])), 9, "step 2 where step 8 was expected"),
        (lambda rows: rows.pop(5), 6, "step 6 where step 5 is missing"),
        (lambda rows: rows[4].pop("kd_weight"), 5, "step 4 lacks kd_weight"),
        (lambda rows: rows[4].pop("step"), 5, "'step' is missing"),
        (lambda rows: rows[4].update(ce_nats=None), 5, "'ce_nats' is not finite.*diverged"),
        (lambda rows: rows[4].update(ce_nats=math.nan), 5, "'ce_nats' is not finite.*diverged"),
        (lambda rows: rows[4].update(ce_nats="3"), 5, "'ce_nats' is '3', expected a number"),
        (lambda rows: rows[4].update(step_time_s=-1.0), 5, "negative time"),
        (lambda rows: rows[4].update(phase="sft"), 5, "phase is 'sft'"),
        (lambda rows: rows[8].update(phase="kd"), 9, "phase 'kd' after phase 'lm'"),
        (lambda rows: rows[10].pop("valid_accuracy"), 11, "'valid_accuracy' is missing"),
        (lambda rows: [rows[10].pop(key) for key in list(rows[10]) if "valid" in key], 11, "no ev"),
        (lambda rows: rows.__delitem__(slice(1, None)), 1, "no training step"),
    ],
)
def test_broken_metrics_name_file_line_and_remedy(
    tmp_path: Path, change: Callable[[list[dict[str, Any]]], Any], line: int, says: str
) -> None:
    directory = write_run(tmp_path / "run", break_rows(change))
    with pytest.raises(ValueError, match=rf"metrics\.jsonl:{line}: .*{says}"):
        load_run(directory)


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ('{"step": 1, "pha', 1, "last line is torn"),
        ('{"step": 1\n{"step": 2}\n', 1, "not JSON.*Restore"),
        ("[1]\n", 1, "one JSON object per line"),
        ("", 1, "empty"),
    ],
)
def test_torn_lines_are_named(tmp_path: Path, text: str, line: int, says: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=rf"metrics\.jsonl:{line}: .*{says}"):
        load_run(tmp_path)


def test_missing_directory_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metrics\.jsonl: no such file.*output directory"):
        load_run(tmp_path / "absent")


# ---- the command line ----


def test_tool_prints_the_tables_and_writes_the_report(
    baseline: Path,
    salt: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "report.md"
    args = ["--baseline", baseline, "--run", salt, "--output", output, "--label", "A", "B"]
    call("compare", *args, "--teacher", write_run(tmp_path / "slm", make_rows({100: 3.8})))
    printed = capsys.readouterr().out
    assert table_row(printed, "A")[0] == "3.0000"
    assert table_row(printed, "B")[0] == "2.5000"
    assert table_row(printed, "*slm, its own run*")[0] == "3.8000"
    assert output.is_file()


def test_tool_takes_seeds_of_baseline_and_runs(
    seeds: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = ["--baseline", *seeds[:2], "--run", *seeds[2:], "--output", tmp_path / "report.md"]
    call("compare", *args, "--label", "A", "A", "B", "B")
    means = capsys.readouterr().out
    assert table_row(means, "A")[1] == "3.1000 (3.0000 to 3.2000)"
    assert table_row(means, "B")[1] == "2.8000 (2.5000 to 3.1000)"


def test_tool_reports_errors_without_a_traceback(
    baseline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for output, message in (("r.md", "metrics.jsonl: no such file"), ("folder", "--output names")):
        runs = ["--baseline", baseline, "--run", tmp_path, "--output", tmp_path / output]
        assert call("compare", *runs) == 2
        assert message in capsys.readouterr().err
