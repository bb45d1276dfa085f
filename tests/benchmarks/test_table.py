"""The documentation quotes what was measured, and nothing else."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.checkout import ROOT


def test_the_page_has_the_table_of_the_committed_results() -> None:
    (names,) = re.findall(r"^DATA_BENCHMARKS := (.*)$", (ROOT / "Makefile").read_text(), flags=re.M)
    command = [sys.executable, str(ROOT / "benchmarks" / "table.py"), *names.split()]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert table.strip() in (ROOT / "docs" / "data-benchmarks.md").read_text(), "benchmarks/table.py makes it"
