"""What steps over shards say of their work while they are at it."""

from __future__ import annotations

from collections import Counter

from moray.pipelines.shards import pace


def test_the_pace_is_of_what_was_read_and_names_reasons_by_how_many() -> None:
    totals = Counter({"documents": 3000, "bytes": 5_000_000, "dropped:short": 2, "dropped:long": 30, "dropped:no": 0})
    assert pace(totals, 2.0) == "1,500 documents/s, 2.5 MB/s; dropped 30 long, 2 short"
    assert pace(Counter(), 1.0) == "0 documents/s, 0.0 MB/s"
