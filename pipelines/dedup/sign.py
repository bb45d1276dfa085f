"""The first pass over the text: identity, content hash and band keys of each document."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from moray.pipelines.dedup.priority_order import described, documents_in, read_documents
from moray.pipelines.dedup.sketches import has_sketches, write_sketches
from moray.pipelines.shared.shards import Row
from moray.pipelines.text.minhash import Shingling


def sign_shard(shard: Row, folder: str, shingling: Shingling, prefer: Sequence[str]) -> Row:
    """Writes the sketches of a shard, unless an earlier run has written them."""
    name = Path(shard["path"]).stem
    if not has_sketches(Path(folder), name):
        table = read_documents(Path(shard["path"]))
        keys, shingles = shingling.keys(table["text"])
        write_sketches(Path(folder), name, documents_in(pa.table(described(table)), prefer), keys, shingles > 0)
    return {"shard": shard["shard"]}
