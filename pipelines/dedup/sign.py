"""The first pass over the text: identity, content hash and band keys of each document."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from moray.pipelines.dedup.priority_order import described, documents_in, read_documents
from moray.pipelines.dedup.sketches import has_sketches, write_sketches
from moray.pipelines.shared.shards import Row, shard_path, shard_stem
from moray.pipelines.text.minhash import Shingling
from moray.platform.store.paths import AnyPath


def sign_shard(shard: Row, folder: AnyPath, shingling: Shingling, prefer: Sequence[str], ranges: int) -> Row:
    """Writes the sketches of a shard, unless an earlier run has written them."""
    name = shard_stem(shard)
    if not has_sketches(folder, name):
        table = read_documents(shard_path(shard))
        keys, shingles = shingling.keys(table["text"])
        write_sketches(folder, name, documents_in(pa.table(described(table)), prefer), keys, shingles > 0, ranges)
    return {"shard": shard["shard"]}
