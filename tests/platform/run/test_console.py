"""Text from users, files and exceptions is neither markup nor terminal commands."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text

from moray.platform.run.console import PlainConsole, print_table, visible
from tests.checkout import ROOT

PLATFORM = ROOT / "platform"
NASTY = ["[/INST]", "[bold]loud[/bold]", "\\[x]", ":smile:", "[link=http://x]y[/link]", "a\x1b[31mred\x1b[0m", "\x9b2J"]


def shown(text: str) -> list[str]:
    """A text as a string, a table's cell and a Text object show it."""
    found = []
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row(text)
    for thing in (text, Text(text), table):
        file = io.StringIO()
        PlainConsole(file=file, force_terminal=True, color_system=None, width=400).print(thing)
        found.append(file.getvalue().rstrip())
    return found


@pytest.mark.parametrize("text", NASTY)
def test_text_is_shown_as_it_is(text: str) -> None:
    assert set(shown(text)) == {visible(text)}
    assert "\x1b" not in visible(text)


@given(st.text(st.characters(exclude_categories=["Cs", "Zl", "Zp"], exclude_characters="\r\n\t"), max_size=30))
def test_no_control_character_reaches_the_terminal(text: str) -> None:
    for line in shown(text):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", line)


def test_a_wide_table_is_not_folded_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([f"column {n}" for n in range(20)], [["some words of a value" for _ in range(20)]])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[1].count("some words of a value") == 20


def test_a_terminal_too_narrow_for_a_table_gets_a_line_a_value(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    print_table([f"column {n}" for n in range(20)], [["some words" for _ in range(20)]])
    assert "column 7: some words" in capsys.readouterr().out.splitlines()
    print_table(["one", "two>"], [["some words", "7"]])
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_no_other_module_makes_a_console() -> None:
    found = [path.name for path in PLATFORM.rglob("*.py") if re.search(r"(?<!Plain)Console\(", path.read_text())]
    assert found == []
    marked = [path.name for path in PLATFORM.rglob("*.py") if "from_markup" in path.read_text()]
    assert marked == []
