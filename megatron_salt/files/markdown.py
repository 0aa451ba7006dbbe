"""Tables for people."""

from __future__ import annotations

from collections.abc import Sequence

BYTE_UNITS = ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"))
TIME_UNITS = ((3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"))


def unit_for(largest: float, units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """The unit in which numbers up to `largest` read well: how much of the base it is, its name."""
    return next((unit for unit in units if largest >= unit[0]), units[-1])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it also reads well in a terminal; numbers to the right."""
    header, *rows = ([cell.replace("|", "\\|") for cell in row] for row in (header, *rows))
    columns = [list(column) for column in zip(header, *rows, strict=True)]
    widths = [max(3, *(len(cell) for cell in column)) for column in columns]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        padded[0] = cells[0].ljust(widths[0])
        return f"| {' | '.join(padded)} |"

    rules = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(header), line(rules), *(line(row) for row in rows)])
