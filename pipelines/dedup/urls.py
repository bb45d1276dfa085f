"""The step `dedup-urls`: keeps one document per URL.

URLs are compared after `w3lib.url.canonicalize_url` (the rules of Scrapy: sorted query parameters, normalized escapes,
lower-case host, no fragment), without tracking parameters and without the default port. `http` and `https`, `www.` and
a trailing slash make different URLs, because servers may respond differently. Documents without a URL, or with an
unreadable one, are kept.
"""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import ClassVar
from urllib.parse import urlsplit, urlunsplit

import numpy as np
import pyarrow as pa
from pydantic import Field

from moray.pipelines.dedup.priority_order import PriorityOrder, described, read_documents
from moray.pipelines.dedup.removal import keep_shard, preferring_shards, read_outputs
from moray.pipelines.shared.arrays import Indices
from moray.pipelines.shared.documents import write_parquet
from moray.pipelines.shared.shards import Row, file_bytes, map_shards, output_path, shard_path
from moray.pipelines.shared.task_records import forget_records
from moray.platform.core.errors import InputError, nearest
from moray.platform.plan.config import StepConfig
from moray.platform.plan.context import StepContext
from moray.platform.plan.step import Step
from moray.platform.store.paths import AnyPath, remove_folder

_URLS = ".urls"
_PORTS = {"http": 80, "https": 443}
TRACKING = (
    "utm_source", "utm_medium", "utm_campaign", "utm_term", "utm_content", "utm_id", "gclid", "dclid", "fbclid",
    "msclkid", "yclid", "twclid", "igshid", "mc_cid", "mc_eid",
)  # fmt: skip


class DedupUrlsConfig(StepConfig):
    key: str = Field("url", min_length=1, description="key in `meta` with the URL")
    ignore: tuple[str, ...] = Field(TRACKING, description="query parameters removed before URLs are compared")
    prefer: tuple[str, ...] = Field((), description="sources whose documents are kept, highest priority first")
    newest: str = Field("", description="key in `meta` with a date: keep the newest document; '': keep the longest")


class DedupUrls(Step[DedupUrlsConfig]):
    name: ClassVar[str] = "dedup-urls"
    version: ClassVar[int] = 1
    Config = DedupUrlsConfig
    inputs: ClassVar[dict[str, str]] = {"documents": "documents"}
    produces: ClassVar[str] = "documents"
    resumable: ClassVar[bool] = True
    needs_ray: ClassVar[bool] = True

    def reads_in_place(self, config: DedupUrlsConfig) -> frozenset[str]:
        return frozenset({"documents"})

    def run(self, ctx: StepContext[DedupUrlsConfig]) -> None:
        shards = preferring_shards(ctx)
        read = partial(read_urls, folder=ctx.output / _URLS, config=ctx.config)
        map_shards(ctx, "reading", shards, read, "bytes", file_bytes)
        tables = read_outputs(ctx.output / _URLS, shards)
        _check_fields(tables, ctx.config, shard_path(shards[0]))
        removed = repeated_urls(tables, ctx.config)
        write_parquet(ctx.output / "removed.parquet", removed)
        keep = partial(keep_shard, folder=ctx.output)
        rows = map_shards(ctx, "writing", shards, keep, "bytes", file_bytes)
        remove_folder(ctx.output / _URLS)
        forget_records(ctx.output)
        urls = pa.concat_tables(tables)["url"]
        unreadable = sum(url == "" for url in urls.to_pylist())
        ctx.counts |= {
            "in:documents": len(urls),
            "out:documents": sum(row["kept"] for row in rows),
            "bytes": sum(row["bytes"] for row in rows),
            "dropped:url": len(removed),
            "without:url": urls.null_count,
            "unreadable:url": unreadable,
        }
        ctx.outcome = f"removed {len(removed)} of {len(urls) - urls.null_count - unreadable} documents with a URL"


def read_urls(shard: Row, folder: AnyPath, config: DedupUrlsConfig) -> Row:
    """Writes a row for each document of a shard, with its URL: null if it has none, '' if it is unreadable."""
    path = output_path(folder, shard)
    if not path.exists():
        table = read_documents(shard_path(shard), "meta")
        metas = [dict(meta.as_py() or []) for meta in table["meta"]]
        urls = [canonical_url(meta[config.key], config.ignore) if meta.get(config.key) else None for meta in metas]
        dates = [_seconds(meta.get(config.newest)) if config.newest else None for meta in metas]
        rows = {**described(table), "url": pa.array(urls, pa.string()), "date": pa.array(dates, pa.float64())}
        write_parquet(path, pa.table(rows))
    return {"shard": shard["shard"]}


def _check_fields(tables: list[pa.Table], config: DedupUrlsConfig, path: AnyPath) -> None:
    """Raises InputError if no document has a `meta` key that the recipe names: the step would do nothing."""
    for field, column in (("key", "url"), ("newest", "date")):
        name = getattr(config, field)
        named = name and name != DedupUrlsConfig.model_fields[field].default
        if named and all(table[column].null_count == len(table) for table in tables):
            known = {key for meta in read_documents(path, "meta")["meta"].to_pylist()[:1000] for key, _ in meta or ()}
            kind = "" if field == "key" else " with a date"
            raise InputError(f"dedup-urls.{field}: no document has {name!r} in `meta`{kind}", nearest(name, known))


def canonical_url(url: str, ignore: tuple[str, ...] = TRACKING) -> str:
    """The form in which URLs are compared; '' if `url` is not an http or https URL."""
    from w3lib.url import canonicalize_url, url_query_cleaner

    try:
        known = url_query_cleaner(url.strip(), ignore, remove=True, unique=False)
        found = urlsplit(canonicalize_url(known))
        port = found.port
    except ValueError:
        return ""
    if found.scheme not in _PORTS or not found.hostname:
        return ""
    default = port == _PORTS[found.scheme]
    return urlunsplit(found._replace(netloc=found.netloc.removesuffix(f":{port}") if default else found.netloc))


def _seconds(date: str | None) -> float | None:
    """Seconds since 1970 of a date in ISO 8601 or HTTP format, in UTC unless it has a zone. None if it is no date."""
    for read in (datetime.fromisoformat, parsedate_to_datetime):
        try:
            found = read((date or "").strip())
            return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError, TypeError):  # includes dates and zones out of datetime's range
            continue
    return None


def repeated_urls(tables: list[pa.Table], config: DedupUrlsConfig) -> pa.Table:
    """The removed documents of all shards: id, reason, representative, url; sorted by id."""
    order = PriorityOrder.of(tables, config.prefer, _ages(pa.concat_tables(tables)) if config.newest else None)
    urls = order.table["url"].take(pa.array(order.order)).to_pylist()
    first: dict[str, int] = {}
    repeated = [(place, first[url]) for place, url in enumerate(urls) if url and first.setdefault(url, place) != place]
    places: Indices = np.array(repeated, np.int64).reshape(-1, 2)
    removed = {
        "id": order.ids(places[:, 0]),
        "reason": pa.array(["url"] * len(places), pa.string()),
        "representative": order.ids(places[:, 1]),
        "url": pa.array([urls[place] for place, _ in repeated], pa.string()),
    }
    return pa.table(removed).sort_by("id")


def _ages(table: pa.Table) -> Indices:
    """The rank of each document by date, int64 [N]: 0 is the newest. Documents without a date are the oldest."""
    dates = table["date"].fill_null(-np.inf).to_numpy()
    ages: Indices = np.unique(-dates, return_inverse=True)[1].astype(np.int64)
    return ages


step = DedupUrls()
