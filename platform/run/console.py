"""Consoles and tables shared by all commands.

Text from users, files and exceptions is untrusted. rich would interpret `[/INST]` in it as markup, and a terminal would
execute escape sequences in it. Consoles created here do neither. A test checks that no other module creates one.
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
_WRAPPED_WIDTH = 10
_LAYOUT = "\t\n"  # rich handles these itself
# All control characters, and bidirectional overrides.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class PlainConsole(Console):
    """A console that treats every string as plain text and shows control characters as `\\x1b`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        return super().render_str(visible(text, _LAYOUT), **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            text = visible(segment.text, _LAYOUT)
            yield segment if segment.control is not None or text == segment.text else Segment(text, segment.style)


def visible(text: str, kept: str = "") -> str:
    r"""Replaces control characters, except those in `kept`, by readable escapes: `\x1b`."""
    return _CONTROL.sub(lambda found: found[0] if found[0] in kept else ascii(found[0])[1:-1], text)


def err() -> Console:
    return PlainConsole(stderr=True)


def out() -> Console:
    console = PlainConsole(soft_wrap=True)
    if not console.is_terminal:
        console.width = 160  # a file has no width; the default of 80 would wrap tables
    return console


def lenient_streams() -> None:
    """Makes stdout and stderr escape characters that their encoding lacks, instead of raising UnicodeEncodeError."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(errors="backslashreplace")


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def print_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Prints a plain table to stdout; columns whose name ends in `>` are right-aligned. If the terminal is too narrow,
    prints one `name: value` line per cell instead."""
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
    if not console.is_terminal:  # do not wrap tables in a file
        unbounded = console.options.update(width=1 << 16)
        console.width = max(console.width, Measurement.get(console, unbounded, table).maximum)
    console.print(table)


def _least_width(columns: list[str], rows: list[list[str]]) -> int:
    """The least width of a table whose values may be wrapped into lines of about one word."""
    widths = [max((cell_len(row[i]) for row in [columns, *rows]), default=0) for i in range(len(columns))]
    return sum(min(width, _WRAPPED_WIDTH) + 1 for width in widths)
