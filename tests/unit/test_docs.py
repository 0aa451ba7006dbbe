"""The documentation keeps up with the code: tables, keys, fields and links."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import ROOT
from evaluation_keys import STUDENT_KEYS, TEACHER_KEYS
from hf_folders import MODELS
from hf_models import FAMILIES as AS_THEY_ARE

from megatron_salt.checkpoint.manifest import CheckpointManifest, ModelRecord, RunRecord
from megatron_salt.config.deepspeed import KNOWN_KEYS, REFUSED_KEYS
from megatron_salt.config.fields import KEYS, ModelConfig
from megatron_salt.huggingface.families import FAMILIES, family_of, read_config
from megatron_salt.model.weights import num_parameters
from megatron_salt.report.runs import STEP_KEYS, VALID_KEYS

DOCS = ROOT / "docs"
MANIFEST_KEYS = [
    field.name
    for kind in (CheckpointManifest, ModelRecord, RunRecord)
    for field in dataclasses.fields(kind)
]
DOCUMENTS = sorted(DOCS.glob("*.md"))
LINKING = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(DOCS.rglob("*.md")),
    ROOT / "examples/slurm/README.md",
]


def text_of(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def script(name: str) -> Any:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for their own
    spec.loader.exec_module(module)
    return module


def test_configuration_holds_the_table_made_from_the_code() -> None:
    made = script("make_configuration_table")
    table = made.table()
    for key in KEYS:
        assert table.count(f"| `{key}` |") == 1, key
    assert f"{made.BEGIN}{table}{made.END}" in text_of("configuration.md"), (
        "run: python docs/make_configuration_table.py --write"
    )


def test_architecture_holds_the_parts_made_from_the_code() -> None:
    document = text_of("architecture.md")
    assert script("make_architecture").filled(document) == document, (
        "run: python docs/make_architecture.py --write"
    )


def test_a_step_can_be_read_in_an_hour() -> None:
    made = script("make_architecture")
    assert len(made.PLAIN_STEP) <= made.MOST_FILES
    assert made.lines_of(made.PLAIN_STEP) <= made.MOST_LINES


@pytest.mark.parametrize(
    ("document", "names"),
    [
        ("configuration.md", [*KNOWN_KEYS, *REFUSED_KEYS]),
        ("checkpoints.md", MANIFEST_KEYS),
        ("metrics.md", ["step", *STEP_KEYS, *VALID_KEYS, *STUDENT_KEYS, *TEACHER_KEYS]),
    ],
)
def test_every_name_is_explained(document: str, names: list[str]) -> None:
    text = text_of(document)
    assert [name for name in names if f"`{name}`" not in text] == []


def anchors_of(document: Path) -> set[str]:
    """What GitHub and the site call its headings."""
    text = re.sub(r"^ *```.*?^ *```", "", document.read_text(encoding="utf-8"), flags=re.M | re.S)
    return {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    }


@pytest.mark.parametrize("document", LINKING, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#]*)#?([^)]*)\)", document.read_text(encoding="utf-8"))
    dead = []
    for target, anchor in links:
        there = document.parent / target if target else document
        if "://" not in target and not (
            there.exists() and (not anchor or anchor in anchors_of(there))
        ):
            dead.append(f"{target}#{anchor}")
    assert dead == []


def test_every_document_is_in_the_navigation_of_the_site() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    pages = script("site_hooks").pages_of(nav)
    shown = [page for page in pages if (DOCS / page).exists()]
    assert sorted(shown) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
    assert set(pages) - set(shown) == {
        "index.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/slurm/README.md",
    }  # fmt: skip


def test_links_of_a_document_lead_to_pages_of_the_site() -> None:
    links = script("site_hooks").with_links_of_site
    for path, text, expected in (
        ("README.md", "[a](docs/data.md#objectives)", "[a](data.md#objectives)"),
        ("README.md", "![a](docs/quickstart/chosen.png)", "![a](quickstart/chosen.png)"),
        ("docs/data.md", "[`a`](../setup.py) b", "[`a`](source/setup.py.md) b"),
        ("docs/timeline/README.md", "[a](../../README.md)", "[a](../index.md)"),
        ("docs/timeline/README.md", "](../make_tables.py)", "](../make_tables.py)"),
        ("docs/timeline/README.md", "](../site_hooks.py)", "](../source/docs/site_hooks.py.md)"),
        ("examples/slurm/README.md", "[a](../../docs/data.md)", "[a](../../data.md)"),
        # As they stand: code, what is elsewhere, what leads nowhere and ends the build.
        *[("README.md", text, text) for text in (
            "`[a](docs/data.md)`", "```\n[a](docs/data.md)\n```", "[a](https://b.c/docs/data.md)",
            "[a](#train)", "[a](docs/nothing.md)", "[a](../../README.md)",
        )],
    ):  # fmt: skip
        assert links(path, text) == expected


def test_lists_are_indented_as_the_site_reads_them() -> None:
    text = """a
- b
  c
lazy
  c

  | d |
2. e
   - f
     g
   ```
   - h
     i
   ```

j
- k

    l
"""
    expected = """a

- b
    c
    lazy
    c

    | d |
2. e
    - f
        g
    ```
    - h
      i
    ```

j

- k

      l
"""
    assert script("site_hooks").with_wide_indents(text) == expected
    code = "a\n\n    - b\n      - c\n"
    assert script("site_hooks").with_wide_indents(code) == code


def test_a_listing_is_whole_and_names_break_in_tables_only() -> None:
    hooks = script("site_hooks")
    page = hooks.listing("docs/site_hooks.py")
    source = (DOCS / "site_hooks.py").read_text(encoding="utf-8")
    assert f"\n````py\n{source}````\n" in page
    row = "<p><code>a_b</code><td>c_d <code>{}</code></td>"
    html = hooks.on_post_page(row.format("e.f_g"), page=None, config=None)
    assert html == row.format("e.<wbr>f_<wbr>g")


def test_the_site_builds_and_refuses_a_page_that_fetches(tmp_path: Path) -> None:
    build = pytest.importorskip("mkdocs.commands.build", reason="make docs installs mkdocs")
    pytest.importorskip("material", reason="make docs installs mkdocs-material")
    from mkdocs.config import load_config
    from mkdocs.exceptions import PluginError

    config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path))
    build.build(config)
    assert "= SOURCE" not in (tmp_path / "site/iframe-worker.js").read_text(encoding="utf-8")
    home = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert 'src="quickstart/report-heldout-steps.png"' in home
    architecture = (tmp_path / "architecture.html").read_text(encoding="utf-8")
    assert 'href="source/megatron_salt/training/run.py.html"' in architecture
    (tmp_path / "more.html").write_text('<img src="https://a.b/c.png">', encoding="utf-8")
    with pytest.raises(PluginError, match=r"more.html would fetch https://a.b/c.png"):
        script("site_hooks").on_post_build(config=config)


# Names of other packages that our code does not use by name, but whose behaviour is described.
FOREIGN = {
    "DeepSpeedEngine", "loss_fn", "_do_optimizer_sanity_check", "_configure_basic_optimizer",
    "buffered_allreduce_fallback", "DeepSpeedZeroOptimizer_Stage3", "pipe_recv_buf", "grad_layer",
    "apply_rotary_pos_emb", "NaN", "mask_t",
}  # fmt: skip
# Files of a run or of a tool's output, not of the repository.
OUTPUTS = re.compile(r"(train\.)?output_dir/|OUTPUT_DIR/|TAGS|LOGITS|OUT\.|runs/|held_out/")
HISTORY = ("log.md",)  # says what was, in the names of its day


def known_words() -> set[str]:
    """Every word of the repository's code and data, comments and docstrings left out."""
    words: set[str] = set()
    for folder in ("megatron_salt", "tools", "tests", "benchmarks", "docs", "examples"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix == ".py":
                tree = ast.parse(path.read_text(encoding="utf-8"))
                for node in ast.walk(tree):
                    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                        node.value.value = None  # a docstring
                words |= set(re.findall(r"\w+", ast.unparse(tree)))
                words |= {path.stem}
            elif path.suffix in (".cpp", ".cu", ".h", ".yaml", ".json", ".sbatch", ".sh"):
                words |= set(re.findall(r"\w+", path.read_text(encoding="utf-8")))
                words |= {path.stem}
    for name in ("Makefile", "pyproject.toml", "setup.py"):
        words |= set(re.findall(r"\w+", (ROOT / name).read_text(encoding="utf-8")))
    return words


def prose() -> dict[str, str]:
    """Documents, and comments and docstrings of the package, by where they stand."""
    found = {path.name: path.read_text(encoding="utf-8") for path in DOCUMENTS}
    found |= {
        name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")
    }
    for path in (ROOT / "megatron_salt").rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        texts = re.findall(r'"""(.*?)"""', source, re.DOTALL) + re.findall(r"#(.*)", source)
        found[str(path.relative_to(ROOT))] = "\n".join(texts)
    return found


def test_numbers_of_the_quickstart_are_those_of_its_configs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What docs/method.md says of the quick start, looked up where it is set."""
    quickstart = script("../examples/quickstart/run")
    monkeypatch.setattr(sys, "argv", ["run.py"])
    seeds = quickstart.parse_arguments().seeds
    configs = ROOT / quickstart.CONFIGS
    student, teacher = (
        yaml.safe_load((configs / name).read_text(encoding="utf-8"))
        for name in ("tiny.yaml", "tiny_slm.yaml")
    )
    deepspeed = json.loads((ROOT / quickstart.DEEPSPEED).read_text(encoding="utf-8"))
    steps, early = quickstart.STEPS, quickstart.TEACHER_STEPS["weak"]
    rows = steps * deepspeed["train_batch_size"]
    times_as_long, rest = divmod(quickstart.TEACHER_STEPS["strong"], early)
    words = ("no", "one", "two", "three", "four", "five")
    assert (steps, early, rest) == (student["train"]["steps"], teacher["train"]["steps"], 0)
    text = " ".join(text_of("method.md").split())
    for phrase in (
        f"a {teacher['model']['num_layers']}-layer teacher and a "
        f"{student['model']['num_layers']}-layer student",
        f"on {words[quickstart.CORPUS_BYTES // 10**6]} megabytes of Python source",
        f"trains the teacher {words[times_as_long]} times as long",
        f"{words[seeds].capitalize()} seeds of the student",
        f"The models see {rows * student['data']['seq_length'] / 1000:.0f} thousand tokens",
    ):
        assert phrase in text, phrase
    assert ("was trained on as many as the student" in text) == (steps == early)
    hint = (configs / "tiny.yaml").read_text(encoding="utf-8")
    assert f"--salt.kd_steps {quickstart.KD_STEPS}`" in hint


def test_the_cost_of_a_kd_step_is_that_of_the_papers_models() -> None:
    """N_T / (3 N_S), by the parameters of the example configs."""
    sizes = []
    for name in ("paper_1.5b_teacher", "paper_2.8b_student"):
        text = (ROOT / "examples/configs" / f"{name}.yaml").read_text(encoding="utf-8")
        model = ModelConfig(**yaml.safe_load(text)["model"])
        sizes.append(num_parameters(model, 32_000, yaml.safe_load(text)["data"]["seq_length"]))
    (teacher, small), (student, large) = ((n, f"{n / 1e9:.1f} B") for n in sizes)
    share = teacher / (3 * student)
    phrase = f"more than a plain one, {100 * share:.0f} % for {small} and {large}"
    assert phrase in " ".join(text_of("method.md").split())


def hugging_face_table() -> dict[str, list[str]]:
    """Cells of the table of models in docs/huggingface.md, by model_type."""
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", text_of("huggingface.md"), re.MULTILINE)
    return {kind: [cell.strip() for cell in cells.split("|")] for kind, cells in rows}


def test_the_table_of_hugging_face_models_is_what_is_tested() -> None:
    """Converted and exported: test_families.py, over MODELS. As it is: test_teacher_model.py."""
    table = hugging_face_table()
    assert list(table)[: len(FAMILIES)] == list(FAMILIES)
    assert set(table) == {*FAMILIES, *AS_THEY_ARE}
    exported_as: dict[str, set[str]] = {}
    for name, fields in MODELS.values():
        kinds = [
            k for k, f in FAMILIES.items() if f.architecture.startswith((f"{name}For", f"{name}LM"))
        ]
        (kind,) = kinds
        model = read_config({"model_type": kind, **fields}, "config.json")[1]
        exported_as.setdefault(kind, set()).add(family_of(model)[0])
    source = (ROOT / "tests/unit/huggingface/test_teacher_model.py").read_text(encoding="utf-8")
    tried = set(re.findall(r'^        \("(\w+)", \d+, ', source, re.MULTILINE))
    for kind, (converted, exported, as_it_is, _) in table.items():
        assert (converted == "yes") == (kind in exported_as), kind
        targets = exported_as.get(kind, set())
        expected = "no" if not targets else "yes" if targets == {kind} else f"as `{min(targets)}`"
        assert exported == expected, kind
        assert (as_it_is == "yes") == (kind in tried), kind


def test_every_name_in_backticks_exists() -> None:
    """A name is what has an underscore, a dot or a capital inside; a path is what has a slash."""
    words, stale = known_words() | {*STUDENT_KEYS, *TEACHER_KEYS}, []
    for where, text in prose().items():
        if where in HISTORY:
            continue
        text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        for name in re.findall(r"`([A-Za-z][\w./]*[A-Za-z0-9])(?:\(\))?`", text):
            if OUTPUTS.match(name):
                continue
            if "/" in name:
                places = (ROOT, ROOT / "megatron_salt", ROOT / "megatron_salt/kernels", DOCS)
                if "." in name and not any((place / name).exists() for place in places):
                    stale.append(f"{where}: {name}")
            elif re.search(r"[_.]|[a-z][A-Z]", name):
                if set(re.findall(r"\w+", name)) - words - FOREIGN:
                    stale.append(f"{where}: {name}")
    assert stale == []
