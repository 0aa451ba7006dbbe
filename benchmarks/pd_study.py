"""Pre-training distillation from stored logits, small enough for a CPU: what helps, how much?

    python benchmarks/pd_study.py [--output runs/pd_study] [--quick]

A teacher larger than its students is trained once on Python source. `cache-logits` stores what it
says: its likeliest tokens, and tokens drawn from it. Then students train for a whole run under
every setting below, two seeds each, and are scored on the same held-out text. The questions are
those of arXiv 2410.16215 (weight, temperature, divergence, schedules, truncation) and arXiv
2503.16870 (likeliest tokens or drawn ones). What the papers print stands beside our figures.
Whether the orders agree is counted and never asserted. Writes results/pd_study.json, .md and plots.
A task that has ended is not repeated: remove its folder to have it done again.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(os.path.relpath(Path(__file__).resolve().parents[1]))
RESULTS = REPO / "benchmarks" / "results"
SEEDS = (1234, 1235)


def quickstart() -> Any:
    """The quick start's way of running commands: forks of a process that has imported PyTorch."""
    path = REPO / "examples" / "quickstart" / "run.py"
    spec = importlib.util.spec_from_file_location("quickstart_run", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their own
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the study is."""

    corpus_bytes: int = 3_000_000
    vocab_size: int = 2048
    teacher: tuple[int, int] = (3, 192)
    """Layers, width."""
    student: tuple[int, int] = (2, 128)
    teacher_steps: int = 600
    teacher_rows: int = 16
    steps: int = 200
    rows: int = 8
    seq_length: int = 128
    eval_samples: int = 256
    early_steps: int = 20
    """Of the student whose gradients are compared."""
    angle_tokens: tuple[int, ...] = (1024, 4096, 16384)
    peak_lr: float = 0.002


FULL = Size()
QUICK = Size(
    corpus_bytes=200_000, vocab_size=512, teacher=(1, 64), student=(1, 32), teacher_steps=3,
    teacher_rows=4, steps=3, rows=4, seq_length=32, eval_samples=8, early_steps=1,
    angle_tokens=(128,),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a student is taught, and how. The defaults are what the questions have in common."""

    weight: float = 0.9
    top_k: int = 50
    draws: int | None = None
    """Tokens drawn at each position, in place of the likeliest ones."""
    temperature: float = 1.0
    divergence: str = "forward_kl"
    lost_mass: str = "renormalise"
    weight_schedule: str = "constant"
    lr_schedule: str = "cosine"

    @property
    def cache(self) -> str:
        """The stored logits that it reads."""
        return "top" if self.draws is None else f"drawn_{self.draws}"

    @property
    def name(self) -> str:
        """Of its runs' folders, before the seed."""
        words = [f"w{self.weight:g}"]
        if self.weight:
            words += [f"k{self.top_k}" if self.draws is None else f"n{self.draws}"]
            words += [f"t{self.temperature:g}"]
        changed = [self.divergence, self.lost_mass, self.weight_schedule, self.lr_schedule]
        plain = ["forward_kl", "renormalise", "constant", "cosine"]
        kinds = ["", "", "weight_", "lr_"]
        words += [k + c for k, c, p in zip(kinds, changed, plain, strict=True) if c != p]
        return "-".join(words)

    def words(self, data: Path, size: Size) -> list[str]:
        """The options that make a run of it."""
        decay, warmup = size.steps // 5, size.steps // 10
        words = ["--train.lr_schedule", self.lr_schedule]
        if self.lr_schedule == "wsd":
            words += ["--train.lr_decay_steps", str(max(1, decay))]
        if not self.weight:
            return words
        salt = {
            "kd_steps": size.steps, "kd_weight": self.weight, "divergence": self.divergence,
            "transition": self.weight_schedule,
        }  # fmt: skip
        if self.weight_schedule == "wsd":
            salt |= {"warmup_steps": warmup, "transition_steps": decay}
        if self.draws is None:
            salt |= {"truncate_k": self.top_k, "lost_mass": self.lost_mass,
                     "teacher_temperature": self.temperature}  # fmt: skip
        words += ["--teacher.logits", f"[{data / self.cache}]"]
        return words + [str(x) for key, v in salt.items() for x in (f"--salt.{key}", v)]


NONE = Setting(weight=0.0)
WSD = {"weight_schedule": "wsd", "lr_schedule": "wsd"}


@dataclass(frozen=True, kw_only=True)
class Question:
    """Settings that differ in one thing, and what a paper found, where it did: higher is better."""

    title: str
    settings: dict[str, Setting]
    published: dict[str, float] = dataclasses.field(default_factory=dict)
    source: str = ""


PD = "arXiv 2410.16215, "
QUESTIONS = (
    Question(
        title="Weight of the KL, constant",
        settings={f"{w:g}": Setting(weight=w) if w else NONE
                  for w in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)},
        published={"0": 0, "0.1": 0.1, "0.5": 1.5, "0.7": 2.9, "0.9": 3.6, "1": 1.6},
        source=PD + "table 4: % over no teacher",
    ),
    Question(
        title="Temperature of the teacher",
        settings={f"{t:g}": Setting(temperature=t) for t in (0.5, 1.0, 2.0, 5.0)},
        published={"0.5": 2.7, "1": 1.6, "2": 2.5, "5": -0.1},
        source=PD + "table 2, at weight 1: % over no teacher",
    ),
    Question(
        title="Divergence",
        settings={"forward KL": Setting(),
                  "squares of probabilities": Setting(divergence="mse_probabilities")},
        published={"forward KL": 2.6, "squares of probabilities": -7.6},
        source=PD + "table 5, at weight 1: % over no teacher; squares of what is our reading",
    ),
    Question(
        title="Schedules of weight and learning rate",
        settings={
            "no teacher, cosine": NONE, "no teacher, wsd": Setting(weight=0.0, lr_schedule="wsd"),
            "constant weight, cosine": Setting(),
            "constant weight, wsd": Setting(lr_schedule="wsd"),
            "wsd weight, cosine": Setting(weight_schedule="wsd"),
            "wsd weight, wsd": Setting(weight_schedule="wsd", lr_schedule="wsd"),
        },
        published={"no teacher, cosine": 0, "no teacher, wsd": 1.2, "constant weight, cosine": 3.6,
                   "wsd weight, cosine": 2.3, "wsd weight, wsd": 8.0},
        source=PD + "tables 4 and 5: % over no teacher",
    ),
    Question(
        title="How many of the likeliest tokens, renormalised, weight 0.9",
        settings={f"{k}": Setting(top_k=k) for k in (1, 5, 12, 50, 100)},
        published={"1": 38.4, "5": 38.7, "50": 39.6, "100": 38.3},
        source=PD + "table 8, at weight 1, of top-0.95: average of its tasks (no teacher: 37.7)",
    ),
    Question(
        title="Likeliest or drawn tokens, weight 0.9",
        settings={"12 likeliest": Setting(top_k=12), "50 likeliest": Setting(),
                  "12 draws": Setting(draws=12), "50 draws": Setting(draws=50),
                  "100 likeliest": Setting(top_k=100)},
    ),
    Question(
        title="Likeliest or drawn tokens, weight 1",
        settings={"no teacher": NONE, "12 likeliest": Setting(weight=1.0, top_k=12),
                  "50 likeliest": Setting(weight=1.0),
                  "12 draws": Setting(weight=1.0, draws=12),
                  "50 draws": Setting(weight=1.0, draws=50),
                  "100 likeliest": Setting(weight=1.0, top_k=100)},
        published={"no teacher": -2.81, "12 likeliest": -2.87, "50 draws": -2.75,
                   "100 likeliest": -2.75},
        source="arXiv 2503.16870: less its loss; beside our 100 likeliest, its whole distribution",
    ),
    Question(
        title="The probability outside of the 12 likeliest tokens, weight 1",
        settings={m: Setting(weight=1.0, top_k=12, lost_mass=m)
                  for m in ("renormalise", "ghost", "raw")},
    ),
)  # fmt: skip


def all_settings(quick: bool) -> list[Setting]:
    """Every setting once; in the smoke test one of each kind."""
    if quick:
        changes: list[dict[str, Any]] = [
            {"divergence": "mse_probabilities"}, {"draws": 12}, WSD, {"lost_mass": "ghost"},
        ]  # fmt: skip
        return [NONE, Setting(), *(Setting(**each) for each in changes)]
    return list(dict.fromkeys(s for question in QUESTIONS for s in question.settings.values()))


# Tasks


def write_inputs(output: Path, size: Size) -> None:
    """The runs' YAML and DeepSpeed JSON."""
    for name, (layers, width), steps, rows in (
        ("teacher", size.teacher, size.teacher_steps, size.teacher_rows),
        ("student", size.student, size.steps, size.rows),
    ):
        config = {
            "model": {"num_layers": layers, "hidden_size": width,
                      "ffn_hidden_size": 11 * width // 4, "num_attention_heads": width // 32,
                      "make_vocab_size_divisible_by": 16},
            "data": {"train_data_path": [str(output / "data" / "corpus_text_document")],
                     "split": "90,10", "seq_length": size.seq_length, "windows": True},
            "train": {"steps": steps, "output_dir": str(output / name),
                      "lr_warmup_steps": steps // 10, "log_interval": 50,
                      "eval_samples": size.eval_samples, "tensorboard": False},
        }  # fmt: skip
        deepspeed = {
            "train_batch_size": rows, "train_micro_batch_size_per_gpu": rows,
            "optimizer": {"type": "AdamW", "params": {
                "lr": size.peak_lr, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1,
                "torch_adam": True, "fused": True}},
            "gradient_clipping": 1.0,
        }  # fmt: skip
        (output / f"{name}.yaml").write_text(json.dumps(config, indent=2), encoding="utf-8")
        (output / f"{name}.json").write_text(json.dumps(deepspeed, indent=2), encoding="utf-8")


def all_tasks(output: Path, size: Size, *, quick: bool) -> list[tuple[Any, Path]]:
    """Each with the file that is there when it has ended."""
    task, data = quickstart().Task, output / "data"
    corpus, tokenizer, prefix = (
        str(data / name) for name in ("corpus.jsonl", "tokenizer.model", "corpus_text_document")
    )

    def salt(name: str, needs: str, done: Path, *words: object) -> tuple[Any, Path]:
        command = ["-m", "megatron_salt", *map(str, words)]
        light = words[0] in ("corpus", "tokenizer", "preprocess")
        need = tuple(filter(None, needs.split()))
        return task(name=name, title=name, command=command, needs=need, light=light), done

    def pretrain(name: str, config: str, needs: str, *words: str) -> tuple[Any, Path]:
        run = ["--config", output / f"{config}.yaml", "--train.output_dir", output / name,
               "--deepspeed_config", output / f"{config}.json"]  # fmt: skip
        return salt(name, needs, output / name / "checkpoints", "pretrain", *run, *words)

    def cache(name: str, *words: object) -> tuple[Any, Path]:
        store = ["--data", prefix, "--teacher", output / "teacher", "--output-prefix", data / name,
                 "--window", size.seq_length, "--held-out", output / "student.yaml"]  # fmt: skip
        done = data / f"{name}.logits.json"
        return salt(name, "teacher", done, "cache-logits", *store, *words)

    students = [
        pretrain(f"{setting.name}-{seed}", "student",
                 setting.cache if setting.weight else "dataset", "--train.seed", str(seed),
                 *setting.words(data, size))
        for setting in all_settings(quick) for seed in SEEDS[: 1 if quick else None]
    ]  # fmt: skip
    angle = [str(REPO / "benchmarks" / "pd_study.py"), "--angle", "--output", str(output)]
    return [
        salt("corpus", "", Path(corpus), "corpus", "--output", corpus, "--max-bytes",
             size.corpus_bytes),
        salt("tokenizer", "corpus", Path(tokenizer), "tokenizer", "--input", corpus, "--output",
             tokenizer, "--vocab-size", size.vocab_size),
        salt("dataset", "tokenizer", Path(f"{prefix}.manifest.json"), "preprocess", "--input",
             corpus, "--tokenizer", tokenizer, "--output-prefix", data / "corpus"),
        pretrain("teacher", "teacher", "dataset"),
        pretrain("early", "student", "dataset", "--train.steps", str(size.early_steps),
                 "--train.lr_warmup_steps", "0"),
        cache("top", "--top_k", 100, "--encoding", "fp16"),
        cache("drawn_12", "--kind", "sampled", "--draws", 12),
        cache("drawn_50", "--kind", "sampled", "--draws", 50),
        (task(name="angle", title="angle", command=angle + ["--quick"] * quick,
              needs=("teacher", "early")), output / "angle.json"),
        *students,
    ]  # fmt: skip


def run_tasks(output: Path, size: Size, *, quick: bool, jobs: int) -> None:
    """All that has not ended before, `jobs` at a time."""
    tasks = [(each, done) for each, done in all_tasks(output, size, quick=quick)
             if not has_ended(done)]  # fmt: skip
    left = {each.name for each, _ in tasks}
    waiting = [dataclasses.replace(each, needs=tuple(n for n in each.needs if n in left))
               for each, _ in tasks]  # fmt: skip
    quickstart().run_all(waiting, output / "logs", jobs)


def has_ended(done: Path) -> bool:
    """A run has when its last checkpoint is there; a killed one begins anew, or goes on."""
    return any(done.glob("step_*")) if done.name == "checkpoints" else done.exists()


# Angles


def angles(output: Path, size: Size) -> list[dict[str, Any]]:
    """Degrees between the mean gradient of a KL from some tokens and that from the whole teacher.

    Of an early student's head, and of its last hidden states, each a mean over the first tokens of
    the dataset. Drawn tokens: the mean over several draws.
    """
    import torch

    from megatron_salt.data.tags import open_indexed, read_stream
    from megatron_salt.kernels import VocabShard
    from megatron_salt.kernels.sparse import Truncation
    from megatron_salt.parallel.groups import initialize

    groups = initialize(1, 1, 30.0)
    vocab = VocabShard(size=size.vocab_size, start=0, stop=size.vocab_size)
    most = max(size.angle_tokens)
    tokens = torch.from_numpy(
        read_stream(
            open_indexed(str(output / "data" / "corpus_text_document")), 0, most + 1
        ).astype("int64")
    )
    models = [frozen(output / name, groups, vocab, size) for name in ("teacher", "early")]
    hidden = [
        torch.cat([model.forward(rows).flatten(0, 1)
                   for rows in tokens[:most].view(-1, size.seq_length).split(64)])
        for model in models
    ]  # fmt: skip
    heads = [model.head_WE for model in models]
    known: dict[str, list[Any]] = {
        f"{k} likeliest, {m}": [Truncation(top_k=k, lost_mass=m)]
        for k, m in ((12, "renormalise"), (12, "ghost"), (12, "raw"), (50, "renormalise"),
                     (100, "renormalise"))
    }  # fmt: skip
    known |= {f"{n} draws": [(n, seed) for seed in range(4)] for n in (12, 50)}
    found = []
    for count in size.angle_tokens:
        some = [x[:count] for x in hidden]
        whole = gradients(*some, *heads, tokens[1 : count + 1], vocab, None)
        for name, ways in known.items():
            each = [gradients(*some, *heads, tokens[1 : count + 1], vocab, way) for way in ways]
            head, states = (
                statistics.mean(degrees(mine[i], whole[i]) for mine in each) for i in (0, 1)
            )
            norm = statistics.mean(float(mine[0].norm() / whole[0].norm()) for mine in each)
            found.append({"target": name, "tokens": count, "head_degrees": head,
                          "hidden_degrees": states, "head_norm_over_whole": norm,
                          "tokens_kept": statistics.mean(mine[2] for mine in each)})  # fmt: skip
    return found


def frozen(run: Path, groups: Any, vocab: Any, size: Size) -> Any:
    """A run's last checkpoint, as teachers are loaded."""
    import torch

    from megatron_salt.checkpoint.folder import resolve
    from megatron_salt.checkpoint.manifest import read_checkpoint_manifest
    from megatron_salt.checkpoint.weights import load_frozen

    folder = resolve(str(run), what="benchmarks/pd_study.py")
    return load_frozen(
        folder, read_checkpoint_manifest(folder), groups, seq_length=size.seq_length,
        dtype=torch.float32, head=vocab, head_columns=vocab.size,
    )  # fmt: skip


def gradients(
    teacher_TE: Any, student_TD: Any, teacher_WE: Any, student_WD: Any, labels_T: Any, vocab: Any,
    way: Any,
) -> tuple[Any, Any, float]:  # fmt: skip
    """Mean gradients of the KL: of the head [W, D] and of a hidden state [D]; tokens kept of each.

    way: None (the whole teacher), a Truncation, or (draws, seed).
    """
    from megatron_salt.kernels import linear_kd_loss

    stored = drawn(teacher_TE, teacher_WE, vocab, *way) if isinstance(way, tuple) else None
    hidden_TD = student_TD.clone().requires_grad_()
    weight_WD = student_WD.clone().requires_grad_()
    loss = linear_kd_loss(
        hidden_TD, weight_WD, None if stored else teacher_TE, None if stored else teacher_WE,
        labels_T, ce_weight_T=0.0, kd_weight_T=1.0 / len(labels_T), vocab=vocab,
        truncation=None if isinstance(way, tuple) else way, stored=stored,
    )  # fmt: skip
    loss.loss.backward()
    kept = getattr(way, "top_k", vocab.size)
    if stored:
        kept = float(stored.logp_TK.isfinite().sum(dim=1).float().mean())
    return weight_WD.grad, hidden_TD.grad.sum(dim=0), kept


def drawn(teacher_TE: Any, teacher_WE: Any, vocab: Any, draws: int, seed: int) -> Any:
    """What `cache-logits --kind sampled` stores, with other random numbers."""
    import torch

    from megatron_salt.kernels.sparse import KeptLogprobs

    generator = torch.Generator().manual_seed(seed)
    ids, logp = [], []
    for some in teacher_TE.split(1024):
        p_TW = (some @ teacher_WE.T)[:, : vocab.size].double().softmax(dim=1)
        at_TN = torch.multinomial(p_TW, draws, replacement=True, generator=generator)
        counts_TW = torch.zeros_like(p_TW).scatter_add_(1, at_TN, torch.ones_like(at_TN).double())
        counts_TK, ids_TK = counts_TW.topk(draws, dim=1)
        ids.append(ids_TK.int())
        logp.append((counts_TK / draws).log().float())
    rest_T = torch.full((len(teacher_TE),), -torch.inf)
    return KeptLogprobs(torch.cat(ids), torch.cat(logp), rest_T)


def degrees(one: Any, other: Any) -> float:
    one, other = one.double().flatten(), other.double().flatten()
    cosine = float((one @ other) / (one.norm() * other.norm()))
    return math.degrees(math.acos(min(1.0, max(-1.0, cosine))))


# The report


def last_evaluation(run: Path) -> dict[str, Any]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if "valid_ce_nats" in record][-1]


def read_results(output: Path, *, quick: bool) -> dict[str, Any]:
    """Of each setting: nats per token and calibration error by seed."""
    runs, stored = {}, {}
    for setting in all_settings(quick):
        found = [
            last_evaluation(output / f"{setting.name}-{seed}")
            for seed in SEEDS[: 1 if quick else None]
        ]
        runs[setting.name] = {
            "nats": [x["valid_ce_nats"] for x in found], "ece": [x["valid_ece"] for x in found],
            "accuracy": [x["valid_accuracy"] for x in found],
        }  # fmt: skip
        if "teacher_valid_ce_nats" in found[0]:
            stored[setting.cache] = found[0]["teacher_valid_ce_nats"]
    teacher = last_evaluation(output / "teacher")
    return {
        "teacher": {"nats": teacher["valid_ce_nats"], "ece": teacher["valid_ece"],
                    "nats_stored_with_its_logits": stored},
        "held_out_tokens": teacher["valid_tokens"], "runs": runs,
        "angle": json.loads((output / "angle.json").read_text(encoding="utf-8")),
    }  # fmt: skip


def seed_spread(runs: dict[str, Any]) -> float:
    """Standard deviation of a run by its seed, in nats: pooled over settings.

    Seeds are common to all settings: what they have in common (the order of the data) is removed.
    """
    differences = [run["nats"][0] - run["nats"][-1] for run in runs.values()]
    return statistics.pstdev(differences) / math.sqrt(2) if len(runs) > 1 else 0.0


def agreement(ours: dict[str, float], published: dict[str, float], margin: float) -> dict[str, Any]:
    """Pairs of settings that both put in the same order, of all, and of those that are told apart:
    more than `margin` nats from each other."""
    counted = {"same": 0, "pairs": 0, "clear_same": 0, "clear_pairs": 0}
    common = [name for name in ours if name in published]
    for one, other in itertools.combinations(common, 2):
        if published[one] == published[other]:
            continue
        # Ours are losses: lower is better.
        same = (ours[one] < ours[other]) == (published[one] > published[other])
        clear = abs(ours[one] - ours[other]) > margin
        counted["pairs"] += 1
        counted["same"] += same
        counted["clear_pairs"] += clear
        counted["clear_same"] += same and clear
    best = min(common, key=ours.__getitem__) == max(common, key=published.__getitem__)
    return {**counted, "same_best": best}


def question_text(question: Question, runs: dict[str, Any], margin: float) -> list[str]:
    """Its table, and how far its order is the paper's."""
    from megatron_salt.files.markdown import markdown_table

    base = statistics.mean(runs[NONE.name]["nats"])
    ours = {k: statistics.mean(runs[s.name]["nats"]) for k, s in question.settings.items()
            if s.name in runs}  # fmt: skip
    header = ["setting", "nats/token", "by seed", "less no teacher", "calibration error"]
    rows = [
        [name, f"{nats:.4f}", ", ".join(f"{x:.4f}" for x in run["nats"]), f"{nats - base:+.4f}",
         f"{statistics.mean(run['ece']):.4f}"]
        for name, nats in ours.items() for run in [runs[question.settings[name].name]]
    ]  # fmt: skip
    if question.published:
        header.append("published")
        for row in rows:
            row.append(f"{question.published[row[0]]:g}" if row[0] in question.published else "")
    lines = [f"## {question.title}", "", markdown_table(header, rows), ""]
    if question.published and len(set(ours) & set(question.published)) > 1:
        found = agreement(ours, question.published, margin)
        lines += [
            f"Published: {question.source}. In the paper's order: {found['same']} of "
            f"{found['pairs']} pairs; of those more than {margin:.3f} nats apart, "
            f"{found['clear_same']} of {found['clear_pairs']}. The best one is "
            f"{'the same' if found['same_best'] else 'another'}.", "",
        ]  # fmt: skip
    return lines


def report(results: dict[str, Any]) -> str:
    from megatron_salt.files.markdown import markdown_table

    size, runs, teacher = results["size"], results["runs"], results["teacher"]
    margin = results["margin_nats"]
    lines = [
        "# Pre-training distillation from stored logits", "",
        f"{results['machine']}. Teacher: {size['teacher'][0]} layers of {size['teacher'][1]}, "
        f"{size['teacher_steps']} steps of {size['teacher_rows']} rows. Students: "
        f"{size['student'][0]} layers of {size['student'][1]}, {size['steps']} steps of "
        f"{size['rows']} rows. A row is {size['seq_length']} tokens of Python source, of a "
        f"vocabulary of {size['vocab_size']}. "
        f"Scored on {results['held_out_tokens']} held-out tokens, the same for all. Unless said "
        "otherwise: the 50 likeliest tokens, temperature 1, weight 0.9 throughout, cosine.", "",
        f"The teacher's own: {teacher['nats']:.4f} nats/token, calibration error "
        f"{teacher['ece']:.4f}. Seeds of one setting differ by a standard deviation of "
        f"{results['seed_spread_nats']:.4f} nats, beyond what a seed does to all settings alike. "
        f"Means of two that are within {margin:.4f} nats (two standard errors) are not told apart. "
        "One teacher and one text for all: what others would change is not in that.", "",
    ]  # fmt: skip
    for question in QUESTIONS:
        if sum(s.name in runs for s in question.settings.values()) > 1:
            lines += question_text(question, runs, margin)
    rows = [[x["target"], str(x["tokens"]), f"{x['tokens_kept']:.1f}", f"{x['head_degrees']:.1f}",
             f"{x['hidden_degrees']:.1f}", f"{x['head_norm_over_whole']:.3f}"]
            for x in results["angle"]]  # fmt: skip
    lines += [
        "## Angle to the whole teacher's gradient", "",
        f"Of an early student ({size['early_steps']} steps): degrees between the mean gradient of "
        "the KL and that from the whole vocabulary. Published (arXiv 2503.16870): 58 for the 12 "
        "likeliest, 4 for about 12 distinct tokens of 50 draws.", "",
        markdown_table(["target", "tokens in the mean", "kept of each", "head", "hidden state",
                        "length of the head's"], rows), "",
    ]  # fmt: skip
    return "\n".join(lines)


def plot(results: dict[str, Any], title: str, questions: Sequence[tuple[str, Question]],
         path: Path, *, scale: str) -> None:  # fmt: skip
    """Held-out nats against what the questions' settings are named by; a dot for each seed."""
    import matplotlib
    from matplotlib.figure import Figure

    from megatron_salt.report.plots import BASELINE_COLOUR, COLOURS, MARKERS, PLOT_STYLE

    runs = results["runs"]
    with matplotlib.rc_context(PLOT_STYLE):
        figure = Figure(figsize=(5.6, 3.8))
        axes = figure.subplots()
        for place, (label, question) in enumerate(questions):
            points = [(float(name.split()[0]), runs[s.name]["nats"])
                      for name, s in question.settings.items()]  # fmt: skip
            style = {"color": COLOURS[place], "marker": MARKERS[place]}
            axes.plot([x for x, _ in points], [statistics.mean(y) for _, y in points], label=label,
                      **style)  # fmt: skip
            for x, by_seed in points:
                axes.scatter([x] * len(by_seed), by_seed, s=9, alpha=0.6, **style)
        base = statistics.mean(runs[NONE.name]["nats"])
        axes.axhline(base, color=BASELINE_COLOUR, linewidth=1.0, label="no teacher")
        teacher = results["teacher"]["nats"]
        axes.axhline(teacher, color=BASELINE_COLOUR, linestyle="--", linewidth=1.0, label="teacher")
        axes.set(xlabel=title, ylabel="held-out nats/token", xscale=scale)
        axes.legend()
        figure.savefig(path)


def plots(results: dict[str, Any], folder: Path) -> None:
    weight, temperature, _, _, likeliest, kinds, alone, _ = QUESTIONS

    def only(question: Question, word: str) -> Question:
        kept = {k: s for k, s in question.settings.items() if k.split()[-1] == word}
        return dataclasses.replace(question, settings=kept)

    plot(results, "weight of the KL", [("50 likeliest", weight)], folder / "pd_study_weight.png",
         scale="linear")  # fmt: skip
    plot(results, "temperature of the teacher", [("weight 0.9", temperature)],
         folder / "pd_study_temperature.png", scale="log")  # fmt: skip
    by_tokens = [
        ("likeliest, weight 0.9", likeliest), ("likeliest, weight 1", only(alone, "likeliest")),
        ("draws, weight 0.9", only(kinds, "draws")), ("draws, weight 1", only(alone, "draws")),
    ]  # fmt: skip
    plot(results, "tokens of each position", by_tokens, folder / "pd_study_tokens.png",
         scale="log")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/pd_study"))
    parser.add_argument("--results", type=Path, help="(default: benchmarks/results)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="(default: the cores)")
    parser.add_argument("--quick", action="store_true", help="seconds: shows that it runs")
    parser.add_argument("--angle", action="store_true", help="this task alone")
    arguments = parser.parse_args()
    output, quick = arguments.output, arguments.quick
    size = QUICK if quick else FULL
    if arguments.angle:
        (output / "angle.json").write_text(json.dumps(angles(output, size), indent=1) + "\n")
        return
    folder = arguments.results or (output if quick else RESULTS)
    for name in ("data", "logs"):
        (output / name).mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    write_inputs(output, size)
    run_tasks(output, size, quick=quick, jobs=arguments.jobs)

    from megatron_salt.report.markdown import describe_machine

    results = read_results(output, quick=quick)
    spread = seed_spread(results["runs"])
    results = {
        "machine": describe_machine(), "size": dataclasses.asdict(size), "seeds": SEEDS,
        "seed_spread_nats": spread, "margin_nats": 2 * spread, **results,
    }  # fmt: skip
    (folder / "pd_study.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    text = report(results)
    (folder / "pd_study.md").write_text(text, encoding="utf-8")
    if not quick:
        plots(results, folder)
    print("\n" + text)


if __name__ == "__main__":
    main()
