"""The documentation reads in short sentences: at most 20 words on average, none above 35."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import mean

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs").glob("*/README.md")),
    ROOT / "examples/slurm/README.md",
]
MEAN_WORDS, MAX_WORDS = 20, 35

# Code blocks, comments and what a script writes between two of them: their lines are emptied.
NOT_PROSE = re.compile(
    r"<!-- table: begin.*?<!-- table: end -->|<!--.*?-->|^ *```.*?^ *```", re.DOTALL | re.MULTILINE
)
LIST_MARK = re.compile(r" *([-*+]|\d+\.) +")
HEADING_OR_TABLE = re.compile(r" *(#|\|)")
# A point, but not that of an abbreviation; a bracket, a quote or bold letters may close behind it.
SENTENCE_END = re.compile(r"""(?<!\be\.g)(?<!\bi\.e)(?<!\bet al)(?<!\bvs)[.!?][*_)\]"']*\s+""")


def blocks_of(text: str) -> list[tuple[int, str]]:
    """Paragraphs and list items, each with the number of its first line."""
    text = NOT_PROSE.sub(lambda match: "\n" * match.group().count("\n"), text)
    blocks: list[tuple[int, list[str]]] = []
    inside = in_list = False
    for number, line in enumerate(text.splitlines(), start=1):
        mark = LIST_MARK.match(line)
        indented_code = line.startswith("    ") and not inside and not in_list and not mark
        if not line.strip() or HEADING_OR_TABLE.match(line) or indented_code:
            inside = False
            in_list = in_list and not line.startswith(("#", "|"))
            continue
        if mark:
            in_list = True
        elif not line.startswith(" ") and not inside:
            in_list = False
        if mark or not inside:
            blocks.append((number, []))
        blocks[-1][1].append(line[mark.end() :] if mark else line.strip())
        inside = True
    return [(number, " ".join(lines)) for number, lines in blocks]


def sentences_of(block: str) -> list[str]:
    block = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", block)  # images
    block = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", block)  # links: their text
    block = re.sub(r"`[^`]*`", "`code`", block)  # code is one word, and its points end nothing
    return [part for part in re.split(SENTENCE_END, block) if words_in(part)]


def words_in(sentence: str) -> int:
    return sum(1 for word in sentence.split() if re.search(r"\w", word))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_sentences_are_short(document: Path) -> None:
    sentences = [
        (words_in(sentence), number, sentence)
        for number, block in blocks_of(document.read_text(encoding="utf-8"))
        for sentence in sentences_of(block)
    ]
    too_long = [
        f"{document.name}, paragraph at line {number}: {words} words: {sentence}"
        for words, number, sentence in sentences
        if words > MAX_WORDS
    ]
    assert not too_long, "\n".join(too_long)
    average = mean(words for words, _, _ in sentences)
    assert average <= MEAN_WORDS, f"{document.name}: {average:.1f} words per sentence on average"


def test_sentences_are_found() -> None:
    text = """# Title

One `a.b c` of 1.5 B, e.g. two. **Three.** four:

- five
  six
- seven? Eight

| a table. |

```
code. Here
```

    more.code

<!-- a
comment. -->
last ([link](x.md)).
"""
    blocks = blocks_of(text)
    assert [number for number, _ in blocks] == [3, 5, 7, 19]
    found = [sentence.strip("* ") for _, block in blocks for sentence in sentences_of(block)]
    assert found == [
        *("One `code` of 1.5 B, e.g. two", "Three", "four:"),
        *("five six", "seven", "Eight", "last (link)."),
    ]
