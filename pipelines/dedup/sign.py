"""The first pass over the text: who each document is, and its keys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from moray.pipelines.dedup.keep_order import described, documents_in, read_documents
from moray.pipelines.dedup.sketches import is_there, write_sketches
from moray.pipelines.shared.shards import Row
from moray.pipelines.text.minhash import Shingling


def sign_shard(shard: Row, folder: str, shingling: Shingling, prefer: Sequence[str]) -> Row:
    """Writes the sketches of a shard."""
    name = Path(shard["path"]).stem
    if not is_there(Path(folder), name):
        table = read_documents(Path(shard["path"]))
        keys, shingles = shingling.keys(table["text"])
        write_sketches(Path(folder), name, documents_in(pa.table(described(table)), prefer), keys, shingles > 0)
    return {"shard": shard["shard"]}
