"""trafilatura on one job, from pages in memory to main texts. Runs in the peers' environment; prints CPU-seconds.

Usage: python extraction.py PAGES.parquet TEXTS.parquet
"""

from __future__ import annotations

import json
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import trafilatura


def main(path: str, out: str) -> None:
    data = pq.read_table(path)["html"].to_pylist()
    trafilatura.extract(data[0])
    began = time.process_time()
    texts = [trafilatura.extract(one, include_comments=False) or "" for one in data]
    print(json.dumps(time.process_time() - began))
    pq.write_table(pa.table({"text": texts}), out)


if __name__ == "__main__":
    main(*sys.argv[1:])
