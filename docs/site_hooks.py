"""What `make docs` does besides mkdocs: README.md as home page, links to files outside docs/.

Documents link to one another as they lie in the repository, and GitHub shows them so. On the site
a file outside docs/ that is linked to gets a page of its own, source code a listing.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the tests read this file where mkdocs is not installed
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# Code, fences among it, and links: target and anchor. A link is one where code is not.
CODE_OR_LINK = re.compile(
    r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)|\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)", re.DOTALL
)
LIST_MARK = re.compile(r"(?:[-*+]|\d+[.)]) +(?=\S)")
LISTING = """\
---
search: {{exclude: true}}
hide: [toc]
---
# {path}

{fence}{language}
{text}
{fence}
"""
LANGUAGES = {".cu": "cpp", ".h": "cpp", ".txt": "text", ".sbatch": "sh"}
# What a page fetches by itself when it is shown; <a href> is for the reader to follow.
FETCHED = re.compile(r"<(?!a\b)\w+\b[^>]*\b(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)")
CELL, CODE = re.compile(r"<td.*?</td>", re.DOTALL), re.compile(r"(?<=<code>)[^<]*(?=</code>)")


def place(path: str) -> str:
    """Where a file of the repository stands among the site's documents."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/") and not path.endswith(".py"):
        return path.removeprefix("docs/")
    return path if path.endswith(".md") else f"source/{path}.md"


def linked(path: str, text: str) -> Iterator[tuple[re.Match[str], str]]:
    """The links of a document to files of the repository, and these files."""
    for match in CODE_OR_LINK.finditer(text):
        target = match["target"]
        if target and "://" not in target:
            file = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
            if not file.startswith("..") and (ROOT / file).is_file():
                yield match, file


def with_links_of_site(path: str, text: str) -> str:
    """The document's text, its links as the site needs them. Links to nothing stay for mkdocs."""
    parts, end = [], 0
    for match, file in linked(path, text):
        start = posixpath.dirname(place(path)) or "."
        parts += [text[end : match.start()], f"]({posixpath.relpath(place(file), start)}"]
        parts += [match["anchor"] or "", ")"]
        end = match.end()
    return "".join(parts) + text[end:]


def with_wide_indents(text: str) -> str:
    """Lists as Python-Markdown reads them: four spaces a level, whatever a mark's width."""
    lines: list[str] = []
    levels: list[int] = []  # the columns at which the open items' texts start
    fence, before = "", ""
    for line in text.splitlines():
        words = line.lstrip()
        column = len(line) - len(words)
        mark = None if fence else LIST_MARK.match(words)
        lazy = before and not mark and not words.startswith(("#", "```"))
        in_list = bool(levels)
        if words and not fence and not lazy:
            while levels and column < levels[-1]:
                levels.pop()
        if mark and not in_list and before and column < 4:
            lines.append("")  # Python-Markdown begins no list within a paragraph
        extra = max(0, column - levels[-1]) if levels else column
        lines.append(" " * (4 * len(levels) + extra) + words if words else "")
        if mark and (levels or column < 4):
            levels.append(column + mark.end())
        if words.startswith("```"):
            fence = "" if fence else "```"
        before = words if words and not words.startswith("#") else ""
    return "\n".join(lines) + "\n"


def pages_of(nav: Any) -> list[str]:
    """The documents of the navigation, in its order."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in pages_of(part)]


def listing(path: str) -> str:
    """A page that shows a source file."""
    text = (ROOT / path).read_text(encoding="utf-8").rstrip("\n")
    suffix = Path(path).suffix
    return LISTING.format(
        path=path,
        text=text,
        fence="`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0)),
        language=LANGUAGES.get(suffix, suffix.removeprefix(".")),
    )


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Anchors are GitHub's."""
    from pymdownx.slugs import slugify

    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the documents outside docs/ that the navigation has, and what documents link to."""
    from mkdocs.structure.files import File, InclusionLevel

    shown = pages_of(config.nav)
    paths = [path for path in shown if (ROOT / path).is_file()] + ["README.md"]
    paths += [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    for path in paths:  # which grows
        if path.endswith(".md"):
            content = (ROOT / path).read_text(encoding="utf-8")
            paths += [file for _, file in linked(path, content) if file not in paths]
        uri = place(path)
        if files.get_file_from_path(uri) is None:
            if not path.endswith(".md"):
                content = listing(path)
            level = InclusionLevel.INCLUDED if uri in shown else InclusionLevel.NOT_IN_NAV
            files.append(File.generated(config, uri, content=content, inclusion=level))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The document in mkdocs' ways."""
    uri = page.file.src_uri
    if uri.startswith("source/"):
        return markdown
    path = f"docs/{uri}" if page.file.generated_by is None else uri
    path = "README.md" if uri == "index.md" else path
    return with_wide_indents(with_links_of_site(path, markdown))


def on_post_page(output: str, *, page: Page, config: MkDocsConfig) -> str:
    """On a phone a long name in a table breaks behind its points and underscores (style.css)."""

    def breakable(code: re.Match[str]) -> str:
        return re.sub(r"(?<=\w)([._])(?=\w)", r"\1<wbr>", code[0])

    return CELL.sub(lambda cell: CODE.sub(breakable, cell[0]), output)


def on_post_build(*, config: MkDocsConfig) -> None:
    """Puts the search's code where pages on a disk find it; refuses pages that fetch anything."""
    from mkdocs.exceptions import PluginError

    site = Path(config.site_dir)
    (worker,) = (site / "assets/javascripts/workers").glob("search.*.min.js")
    starter = site / "site/iframe-worker.js"
    source = json.dumps(worker.read_text(encoding="utf-8"))
    starter.write_text(
        starter.read_text(encoding="utf-8").replace("= SOURCE", f"= {source}"), encoding="utf-8"
    )
    for page in site.rglob("*.html"):
        for address in FETCHED.findall(page.read_text(encoding="utf-8")):
            raise PluginError(
                f"{page.relative_to(site)} would fetch {address}. The site must work without a"
                " network: put the file into docs/ and link to that"
            )
