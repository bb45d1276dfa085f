"""How many examples property tests draw: as many as they name, or an eighth where `QUICK_EXAMPLES` is set."""

from __future__ import annotations

import os


def examples(count: int) -> int:
    """For `hypothesis.settings(max_examples=...)`."""
    return max(5, count // 8) if os.environ.get("QUICK_EXAMPLES") else count
