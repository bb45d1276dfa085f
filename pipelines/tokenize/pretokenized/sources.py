"""The pretokenized sources of a step: checks before anything starts, and the tasks that read them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from moray.pipelines.shared.shards import Row
from moray.pipelines.tokenize.pretokenized.segments import file_segments, segment_tasks, source_candidates
from moray.pipelines.tokenize.pretokenized.source import PretokenizedSource
from moray.platform.core.errors import InputError, RecipeError
from moray.platform.plan.context import StepContext
from moray.platform.plan.step import ExternalFile, Upload

_THREADS = 32  # they wait for headers and footers
_HASHES = 4


def check_sources(sources: Sequence[PretokenizedSource]) -> None:
    """Raises RecipeError for equal names, and for a source without files."""
    names = Counter(source.name for source in sources)
    if repeated := [name for name, n in names.items() if n > 1]:
        raise RecipeError(f"pretokenized: duplicate name {repeated[0]!r}", "give each source a unique name")
    for number, source in enumerate(sources):
        if source.is_on_hosts and not source.has_files():
            continue  # the driver's host checks them
        try:
            source_candidates(source)
        except InputError as error:
            raise RecipeError(f"pretokenized.{number}: {error.message}", error.hint) from error


def external_files(sources: Sequence[PretokenizedSource]) -> list[ExternalFile]:
    """The files of all sources. Those that are compared by content are read."""
    found = []
    with ThreadPoolExecutor(_HASHES) as threads:
        for source in sources:
            files = source.files()
            digests = threads.map(source.digest, [file for _, file in files])
            for (key, file), digest in zip(files, digests, strict=True):
                found.append(ExternalFile(source.name, key, file.size, digest))
    return found


def submitted_sources(sources: Sequence[PretokenizedSource], upload: Upload) -> dict[str, str]:
    """Uploads the files of local sources, and names them in the config."""
    found = {}
    for number, source in enumerate(sources):
        if source.url is None and not source.submitted and not source.is_on_hosts:
            files = {key: Path(file.location) for key, file in source.files()}
            found[f"pretokenized.{number}.submitted"] = upload(files)
    return found


def source_tasks(ctx: StepContext[Any], sources: Sequence[PretokenizedSource], tokens: int) -> list[Row]:
    """Tasks of about `tokens` ids each. Raises InputError for a file that cannot be read."""
    tasks: list[Row] = []
    with ThreadPoolExecutor(_THREADS) as threads:
        for number, source in enumerate(sources):
            candidates, segments = source_candidates(source), []
            for done, found in enumerate(threads.map(partial(file_segments, group_tokens=tokens), candidates), 1):
                segments += found
                ctx.progress(f"reading headers of {source.name}", done, len(candidates), "files")
            tasks += segment_tasks(number, segments, tokens)
    return [{"shard": number, **task} for number, task in enumerate(tasks)]


def report_ids(ctx: StepContext[Any], sources: Sequence[PretokenizedSource], rows: Sequence[Row]) -> None:
    """Counts what was found in the ids of each source, and tells what was added or split."""
    totals: dict[int, Counter[str]] = {number: Counter() for number in range(len(sources))}
    for row in rows:
        totals[row["source"]].update({name[4:]: n for name, n in row.items() if name.startswith("ids:")})
    for source, found in zip(sources, totals.values(), strict=True):
        if not found["documents"]:
            raise InputError(f"source {source.name!r} has no document with ids", "remove it, or correct its location")
        added = [f"{name} added to {found[name]:,}" for name in ("bos", "eos") if found[name]]
        split = [f"{found['split']:,} split at the eos inside"] if found["split"] else []
        empty = [f"{found['empty']:,} empty ones left out"] if found["empty"] else []
        if parts := added + split + empty:
            ctx.note(f"source {source.name!r}: {found['documents']:,} documents: {', '.join(parts)}")
    if empty_documents := sum(found["empty"] for found in totals.values()):
        ctx.counts["dropped:empty"] = empty_documents
