"""Gopher's, C4's and FineWeb's rules: agreement of Moray's decisions with datatrove's, and speed in CPU-seconds.

Both engines get the same words (split at white space) and the same sentence ends, and run on one thread. Times are the
median of the rounds. datatrove starts from Python strings, its input type. Moray starts from Arrow memory, the format
that Parquet is read into. Decisions are compared by family, including the rule that removes a document and the text
that C4 leaves of it. The time covers the four families in FineWeb's order. The benchmark then measures the other parts
of `filter`: language identification from the first 1,000 characters and from the whole text, and PII redaction. The
texts come from a folder of Parquet files (column `text`). The default is the built corpus (`make bench-corpus`) or, if
it is not built, the texts of this environment. The peers run in a separate environment: `make bench-peers`.

Usage: python benchmarks/filters.py [MEGABYTES=20] [ROUNDS=3] [FOLDER]
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from harness.result import Bar, report
from harness.texts import BUILT, texts_in, texts_of

from moray.pipelines.filter.config import Family, FilterConfig
from moray.pipelines.filter.redact import KINDS, redact
from moray.pipelines.filter.rules import apply_rules
from moray.pipelines.text.language import identify

HERE = Path(__file__).resolve().parent
ORDER: tuple[Family, ...] = ("gopher_repetition", "gopher_quality", "c4", "fineweb")
NAMES = {  # datatrove's reasons -> Moray's fields
    "gopher_short_doc": "min_words", "gopher_long_doc": "max_words", "empty": "empty",
    "gopher_below_avg_threshold": "min_mean_word_length", "gopher_above_avg_threshold": "max_mean_word_length",
    "gopher_too_many_hashes": "max_hashes", "gopher_too_many_ellipsis": "max_ellipses",
    "gopher_too_many_bullets": "max_bullet_lines", "gopher_too_many_end_ellipsis": "max_ellipsis_lines",
    "gopher_below_alpha_threshold": "min_alphabetic_words", "gopher_enough_stop_words": "min_stop_words",
    "dup_para_frac": "max_duplicate_paragraphs", "dup_para_char_frac": "max_duplicate_paragraph_characters",
    "dup_line_frac": "max_duplicate_lines", "dup_line_char_frac": "max_duplicate_line_characters",
    **{f"top_{n}_gram": f"max_top_{n}_gram" for n in (2, 3, 4)},
    **{f"duplicated_{n}_n_grams": f"max_duplicate_{n}_grams" for n in range(5, 11)},
    "too_few_sentences": "min_sentences", "lorem_ipsum": "drop_lorem_ipsum", "curly_bracket": "drop_curly_brackets",
    "line_punct_ratio": "min_punctuated_lines", "short_line_ratio": "max_short_lines",
    "char_dup_ratio": "max_duplicate_line_characters", "list_ratio": "max_newlines_per_word",
}  # fmt: skip


def ours(path: str) -> dict[str, Any]:
    """CPU-seconds of all four families."""
    column, config = pq.read_table(path)["text"], FilterConfig(rules=ORDER)
    apply_rules(column.slice(0, 50), config)  # compiles
    began = time.process_time()
    apply_rules(column, config)
    return {"cpu_s": time.process_time() - began}


def agreement(texts: list[str], theirs: dict[str, list[Any]]) -> dict[str, float]:
    """Share of documents with the same decision for the same reason, by family and for all four together."""
    column = pa.chunked_array([pa.array(texts, pa.large_string())])
    shares = {}
    for family in ORDER:
        judged = apply_rules(column, FilterConfig(rules=(family,)))
        found = [(reason and reason.partition(".")[2]) or reason for reason in judged.reasons]
        expected = [reason and NAMES[reason] for reason in theirs[family]]
        same = [one == other for one, other in zip(found, expected, strict=True)]
        if family == "c4":
            left = judged.texts.to_pylist()
            kept = [reason is None for reason in expected]
            same = [ok and (not kept[i] or left[i] == theirs["c4 texts"][i]) for i, ok in enumerate(same)]
        shares[family] = sum(same) / len(same)
    together = apply_rules(column, FilterConfig(rules=ORDER)).reasons
    verdicts = zip(together, theirs["together"], strict=True)
    shares["all four"] = sum((one is None) == (other is None) for one, other in verdicts) / len(together)
    return shares


def seconds(work: Callable[[], Any]) -> tuple[Any, float]:
    """The result of `work`, and its CPU-seconds as the median of three runs."""
    took = []
    for _ in range(3):
        began = time.process_time()
        found = work()
        took.append(time.process_time() - began)
    return found, statistics.median(took)


def others(texts: list[str]) -> tuple[list[dict[str, Any]], list[Bar]]:
    """Result rows and bars for language identification and PII redaction."""
    identify(texts[:10])
    by_first, first_s = seconds(lambda: identify(texts))
    by_all, all_s = seconds(lambda: identify(texts, max(map(len, texts))))
    same = sum(one == other for one, other in zip(by_first[0], by_all[0], strict=True)) / len(texts)
    found, mask_s = seconds(lambda: [redact(text, KINDS)[1] for text in texts])
    size = sum(len(text.encode()) for text in texts) / 1e6
    rows: list[dict[str, Any]] = [
        {"engine": "languages by 1,000 characters", "cpu_s": first_s, "documents_per_cpu_s": len(texts) / first_s},
        {"engine": "languages by all of a text", "cpu_s": all_s, "documents_per_cpu_s": len(texts) / all_s},
        {"engine": "masks, all kinds", "cpu_s": mask_s, "MB_per_cpu_s": size / mask_s,
         "masked": {kind: sum(counts[kind] for counts in found) for kind in KINDS}},
    ]  # fmt: skip
    return rows, [Bar("languages: equal by the first 1,000 characters", same, 0.99, "higher")]


def measured(command: list[str]) -> float:
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True, text=True
    )
    return float(json.loads(done.stdout.strip().splitlines()[-1])["cpu_s"])


def main(megabytes: str = "20", rounds: str = "3", folder: str = "") -> int:
    python = HERE / "peers" / ".venv" / "bin" / "python"
    if not python.exists():
        raise SystemExit("error: the peers are not installed: make bench-peers")
    place = Path(folder) if folder else BUILT
    texts = texts_in(place, float(megabytes)) if place.is_dir() else texts_of(float(megabytes))
    size = sum(len(text.encode()) for text in texts) / 1e6
    with tempfile.TemporaryDirectory() as work:
        path, decisions = f"{work}/texts.parquet", f"{work}/decisions.json"
        pq.write_table(pa.table({"text": pa.array(texts, pa.large_string())}), path)
        peer = [str(python), str(HERE / "peers" / "filters.py"), path]
        took: dict[str, list[float]] = {"datatrove": [], "moray": []}
        for number in range(int(rounds)):
            took["datatrove"].append(measured([*peer, decisions if number == 0 else "-"]))
            took["moray"].append(measured([sys.executable, __file__, "--ours", path]))
        shares = agreement(texts, json.loads(Path(decisions).read_text()))
    cpu = {name: statistics.median(runs) for name, runs in took.items()}
    rows: list[dict[str, Any]] = [
        {"engine": name, "cpu_s": s, "MB_per_cpu_s": size / s, "documents_per_cpu_s": len(texts) / s}
        for name, s in cpu.items()
    ]
    rows.append({"documents": len(texts), "MB": size, "corpus": "built" if place.is_dir() else "environment"})
    bars = [Bar(f"same decisions, {family}", found, 0.999, "higher") for family, found in shares.items()]
    bars.append(Bar("datatrove over moray", cpu["datatrove"] / cpu["moray"], 10.0, "higher"))
    more_rows, more_bars = others(texts)
    return report("filters", [*rows, *more_rows], [*bars, *more_bars])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--ours"]:
        print(json.dumps(ours(sys.argv[2])))
    else:
        sys.exit(main(*sys.argv[1:]))
