"""What all commands share: where results and everything else are printed, and how.

What users, files and exceptions say is text. rich would read `[/INST]` in it as markup, and a terminal its escape
sequences as commands; a console made here does neither. No other module makes one (a test looks).
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Iterable
from typing import Annotated, Any

from cyclopts import Parameter
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

Json = Annotated[bool, Parameter(name="--json", negative=(), help="print the result as JSON")]
_FOLDED = 10
_LAYOUT = "\t\n"  # rich lays these out
# All control characters, and those that turn the direction of text.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class PlainConsole(Console):
    """A console to which every string is text; its control characters are shown as `\\x1b`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        return super().render_str(visible(text, _LAYOUT), **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            text = visible(segment.text, _LAYOUT)
            yield segment if segment.control is not None or text == segment.text else Segment(text, segment.style)


def visible(text: str, kept: str = "") -> str:
    r"""The same text, with control characters, but those `kept`, as escapes that can be read: `\x1b`."""
    return _CONTROL.sub(lambda found: found[0] if found[0] in kept else ascii(found[0])[1:-1], text)


def err() -> Console:
    return PlainConsole(stderr=True)


def out() -> Console:
    console = PlainConsole(soft_wrap=True)
    if not console.is_terminal:
        console.width = 160  # a file has no width; the default of 80 would fold tables
    return console


def lenient_streams() -> None:
    """Has standard output and errors show what their encoding lacks as escapes, instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(errors="backslashreplace")


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def print_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """A plain table on stdout; a column whose name ends in `>` is set right. A terminal that is too narrow for it gets
    a line for each value instead of columns of a letter."""
    names, cells = [*columns], [[*row] for row in rows]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        table.add_column(name.removesuffix(">"), justify="right" if name.endswith(">") else "left", overflow="fold")
    for row in cells:
        table.add_row(*row)
    console = out()
    if console.is_terminal and console.width < _least_width(names, cells):
        for row in cells:
            for name, value in zip(names, row, strict=True):
                console.print(f"{name.removesuffix('>')}: {value}")
            console.print()
        return
    if not console.is_terminal:  # nobody folds a file
        wide = console.options.update(width=1 << 16)
        console.width = max(console.width, Measurement.get(console, wide, table).maximum)
    console.print(table)


def _least_width(columns: list[str], rows: list[list[str]]) -> int:
    """Of a table whose values may be folded into lines of a word or so."""
    widths = [max((cell_len(row[i]) for row in [columns, *rows]), default=0) for i in range(len(columns))]
    return sum(min(width, _FOLDED) + 1 for width in widths)
