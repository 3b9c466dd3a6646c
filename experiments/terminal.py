"""What the command line prints with: results on stdout, what is said of the work on stderr, tables as wide as who reads them."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

WIDTH = 100
"""Columns where the output is no terminal and the environment names none: what the table is laid out for."""
UNFOLDED = 1_000_000
"""Columns of a list that is piped: a path in it must stay one word."""

console = Console() if sys.stdout.isatty() or "COLUMNS" in os.environ else Console(width=WIDTH)
errors = Console(stderr=True)


def print_table(title: str, headings: Iterable[str], body: Iterable[tuple[str, ...]]) -> None:
    """Folded to the terminal; where the output is none, one line a row."""
    table = Table(title=title or None, title_justify="left", show_lines=False, box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in body:
        table.add_row(*map(escape, row))
    if console.file.isatty():
        console.print(table)
        return
    wide = Console(file=io.StringIO(), width=UNFOLDED, color_system=None)
    wide.print(table)
    for line in wide.file.getvalue().splitlines():  # type: ignore[attr-defined]
        typer.echo(line.rstrip())


def warn(sentence: str) -> None:
    """On stderr, marked as a warning."""
    errors.print(f"[yellow]warning[/yellow] {escape(sentence)}", highlight=False, soft_wrap=True)


def say(sentence: str) -> None:
    """On stderr, as it is."""
    errors.print(escape(sentence), highlight=False, soft_wrap=True)
