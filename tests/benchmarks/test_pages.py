"""Measured numbers in README and docs are those of the committed results."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.checkout import ROOT

RESULT: dict[str, Any] = {
    "measured": {"commit": "0123456789abcdef", "dirty": True, "at": "2026-01-02T03:04:05+00:00"},
    "machine": {"cores": 2, "gpu": None, "processor": "Some CPU"},
    "command": "python benchmarks/speed.py 3",
    "code": None,
    "rows": [{"engine": "moray", "seconds": 1.25}, {"engine": "peer", "seconds": 5000.0}],
    "bars": [
        {"name": "a", "value": 2.0, "goal": 1.0, "better": "higher", "standard_error": 0.0, "outcome": "holds"},
        {"name": "b", "value": 4.0, "goal": 3.0, "better": "lower", "standard_error": 0.9, "outcome": "undecided"},
        {"name": "c", "value": 4.0, "goal": 3.0, "better": "lower", "standard_error": 0.0, "outcome": "fails"},
    ],
}


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import harness.pages as module

    monkeypatch.setattr(module, "RESULTS", tmp_path)
    module.result.cache_clear()
    (tmp_path / "speed.json").write_text(json.dumps(RESULT))
    return module


@pytest.fixture
def code_state(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import harness.code_state as module

    return module


def test_committed_pages_are_current() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "harness.pages", "--check"],
        cwd=ROOT / "benchmarks",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


RATE = re.compile(
    r"\d[\d.,]*\s(?:times as (?:fast|long)|(?:M|G|T)B/s|[KMG]B per CPU-second|tokens/s|TFLOPS|\w+ per CPU-second)\b"
)
# Specifications, figures that others published, and counts that `tests/models/test_flops.py` checks.
NOT_MEASURED = {"3.35 TB/s", "1,979 TFLOPS", "989 TFLOPS", "386.1 TFLOPS", "432 TFLOPS"}


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_rates_and_ratios_are_generated(page: Path) -> None:
    """A measured rate stands between the markers of `make pages`."""
    text = re.sub(
        r"```.*?```|<!-- table\n.*?<!-- /table -->|<!-- result .*?<!-- / -->", "", page.read_text(), flags=re.S
    )
    assert [found[0] for found in RATE.finditer(text) if " ".join(found[0].split()) not in NOT_MEASURED] == []


def test_a_number_in_a_sentence(pages: ModuleType) -> None:
    text = "took <!-- result speed: rows[?engine=='peer'].seconds; ,.0f -->7<!-- / --> s"
    assert pages.rendered(text).endswith("-->5,000<!-- / --> s")
    assert pages.rendered(text.replace("; ,.0f", "; 0.001 .1f")).endswith("-->5.0<!-- / --> s")


def test_a_table_keeps_its_template(pages: ModuleType) -> None:
    text = "<!-- table\n| {speed: rows[0].engine; s} | {speed: rows[0].seconds; .1f} |\n-->\nold\n<!-- /table -->\n"
    once = pages.rendered(text)
    assert once.endswith("-->\n| moray | 1.2 |\n<!-- /table -->\n")
    assert pages.rendered(once) == once


def test_bars_show_outcome_and_age(pages: ModuleType) -> None:
    assert pages.bars_of("speed").splitlines() == [
        "| `speed` † | a | 2 | ≥ 1 |",
        "| `speed` † | b | **4 ± 0.9** (undecided) | ≤ 3 |",
        "| `speed` † | c | **4** | ≤ 3 |",
    ]
    (row,) = pages.results_of("").splitlines()
    assert "| 1 of 3 | 0123456789ab + changes | 2026-01-02 | 2 cores, Some CPU |" in row


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("speed: rows[9].seconds; .1f", "is not one value of speed.json"),
        ("speed: rows[*].seconds; .1f", "is not one value of speed.json"),
        ("absent: rows; .1f", "no result absent"),
        ("speed rows", "is not NAME: EXPRESSION; FORMAT"),
        ("speed: max(rows[].engine[]; .1f", "of speed.json"),
        ("speed: rows[0].engine; .1f", "Unknown format code"),
    ],
)
def test_a_number_without_a_result_is_an_error(pages: ModuleType, reference: str, message: str) -> None:
    with pytest.raises(pages.PageError, match=message.replace("[", r"\[").replace("*", r"\*")):
        pages.value_of(reference)


def test_a_marker_at_the_start_of_a_line_is_an_error(pages: ModuleType) -> None:
    with pytest.raises(pages.PageError, match="line 2 begins with a marker"):
        pages.rendered("takes\n  <!-- result speed: rows[0].seconds; .1f -->1.2<!-- / --> s")


def test_only_code_changes_the_hash(code_state: ModuleType, tmp_path: Path) -> None:
    def hashed(source: str) -> str:
        (tmp_path / "a.py").write_text(source)
        found: str = code_state.hash_code(["a.py"], tmp_path)
        return found

    first = hashed('"""Doc."""\ndef f(x):\n    """Doc."""\n    return x + 1\n')
    assert hashed('"""Other."""\n\n\ndef f( x ):  # why\n    return (x + 1)\n') == first
    assert hashed("def f(x):\n    return x + 2\n") != first
    assert code_state.hash_code(["b.py"], tmp_path) != first


def test_a_distance_within_two_standard_errors_decides_nothing(code_state: ModuleType) -> None:
    from harness.result import Bar

    assert Bar("overhead", 0.0435, 0.03, "lower", 0.019).outcome == "undecided"
    assert Bar("overhead", 0.0435, 0.03, "lower", 0.005).outcome == "fails"
    assert Bar("overhead", 0.0435, 0.03, "lower").outcome == "fails"
    assert Bar("overhead", 0.01, 0.03, "lower", 0.005).outcome == "holds"
