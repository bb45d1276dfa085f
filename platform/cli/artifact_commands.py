"""`moray artifacts`: list, verify, pin and remove artifacts."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from moray.platform.run.console import Json, err, out, print_json, print_table

if TYPE_CHECKING:
    from moray.platform.store.artifacts import Artifact, ArtifactStore
    from moray.platform.store.manifest import DamagedError
    from moray.platform.store.retention import Entry

_DAY_SECONDS = 24 * 3600.0  # older files without a manifest or a lease are leftovers

app = App(name="artifacts", help="List, verify, pin and remove artifacts.", help_format="plaintext")

Limit = Annotated[str, Parameter(help="size to keep, for example 500MB or 1.5TiB")]
DryRun = Annotated[bool, Parameter(negative=(), help="show what would be removed, but remove nothing")]


@app.command(name="list")
def list_artifacts(*, json_: Json = False) -> int:
    """List all artifacts by step, newest first, with their pins, aliases and locations.

    The location is local, remote or both; remote is the shared root (MORAY_ARTIFACTS).
    """
    from moray.platform.core.units import size

    store = _store()
    names, locations = _names(store), _locations(store)
    artifacts = [artifact for artifact, _ in locations.values()]
    damaged = store.damaged()
    rows: list[dict[str, Any]] = [
        {
            "artifact": artifact.reference,
            "produces": artifact.manifest.produces,
            "bytes": artifact.manifest.bytes,
            "made": artifact.manifest.started,
            "run": artifact.manifest.run,
            "held_by": names.get(artifact.reference, []),
            "folder": str(artifact.folder),
            "where": locations[artifact.reference][1],
            "problem": "",
        }
        for artifact in artifacts
    ]
    if json_:
        empty = dict.fromkeys(rows[0] if rows else ("artifact", "problem"))
        print_json([*rows, *({**empty, "artifact": one.reference, "problem": one.message} for one in damaged)])
        return 0
    shown = [
        (
            a.reference,
            a.manifest.produces,
            size(a.manifest.bytes),
            _when(a.manifest.started),
            locations[a.reference][1],
            ", ".join(names.get(a.reference, [])),
            a.manifest.run,
        )
        for a in artifacts
    ]
    print_table(("artifact", "kind", "size>", "made", "location", "held by", "run"), shown)
    _print_damaged(damaged, store.aliases.damaged())
    return 0


@app.command
def verify(
    reference: str = "",
    /,
    *,
    hashes: Annotated[bool, Parameter(negative=(), help="compare contents, not only sizes")] = False,
    json_: Json = False,
) -> int:
    """Compare the files of artifacts on this machine with their manifests. Exit with 1 if any differ.

    REFERENCE is an alias, STEP/FINGERPRINT (a unique prefix is enough) or a folder (default: all artifacts).
    """
    from moray.platform.core.units import size
    from moray.platform.store.search import find_artifact, local_artifacts

    store = _store()
    chosen = [find_artifact(store, reference)] if reference else list(local_artifacts(store))
    artifacts = [artifact for artifact in chosen if artifact.is_local]
    rows = _verified(artifacts, hashes)
    rows += (
        [] if reference else [{"artifact": one.reference, "file": "", "what": one.message} for one in store.damaged()]
    )
    if json_:
        print_json({"artifacts": len(artifacts), "hashes": hashes, "changes": rows})
    else:
        for row in rows:
            where = f"{row['artifact']}/{row['file']}: " if row["file"] else ""
            out().print(f"{where}{row['what']}", markup=False, soft_wrap=True)
        compared = "sizes and contents" if hashes else "sizes"
        total = size(sum(artifact.manifest.bytes for artifact in artifacts))
        out().print(f"{len(artifacts)} artifacts ({total}): {compared} compared, {len(rows)} differences", markup=False)
        if reference and not artifacts:
            err().print("its files are not on this machine; they are verified when they are downloaded", markup=False)
    return 1 if rows else 0


def _verified(artifacts: list[Artifact], hashes: bool) -> list[dict[str, str]]:
    """Returns a row for each file that differs; shows progress when contents are compared."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from moray.platform.store.verify import changes

    columns = (TextColumn("verifying"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    rows = []
    with Progress(*columns, console=err(), transient=True, disable=not hashes) as progress:
        task = progress.add_task("", total=sum(artifact.manifest.bytes for artifact in artifacts))
        for artifact in artifacts:
            for change in changes(artifact.folder, artifact.manifest, hashes, lambda n: progress.advance(task, n)):
                rows.append({"artifact": artifact.reference, "file": change.path, "what": change.problem})
    return rows


@app.command
def pin(reference: str, /, *, json_: Json = False) -> int:
    """Protect an artifact, and everything it was made from, from `gc`.

    REFERENCE is an alias, STEP/FINGERPRINT (a unique prefix is enough) or a folder.
    """
    from moray.platform.store.search import find_artifact

    store = _store()
    chosen = find_artifact(store, reference).reference
    store.pins.add(chosen)
    _print_change(json_, "pinned", chosen)
    return 0


@app.command
def unpin(reference: str, /, *, json_: Json = False) -> int:
    """Remove the pin of an artifact."""
    from moray.platform.store.search import find_artifact

    store = _store()
    chosen = find_artifact(store, reference).reference
    store.pins.drop(chosen)
    _print_change(json_, "unpinned", chosen)
    return 0


@app.command
def unalias(alias: str, /, *, json_: Json = False) -> int:
    """Remove the alias NAME@VERSION. Its artifact is kept, but `gc` may remove it later."""
    _store().aliases.drop(alias)
    _print_change(json_, "forgotten", alias)
    return 0


@app.command
def rm(reference: str, /, *, json_: Json = False) -> int:
    """Remove one artifact, also from the shared root. Fails if a pin or an alias needs it."""
    from moray.platform.core.errors import InputError
    from moray.platform.store.manifest import DamagedError
    from moray.platform.store.retention import lineage
    from moray.platform.store.search import find_artifact
    from moray.platform.store.sweep import remove_artifact

    store = _store()
    try:
        chosen = find_artifact(store, reference).reference
    except DamagedError as error:
        chosen = error.reference
    entries = {entry.reference: entry for entry in _entries(store)}
    for holder, names in _names(store).items():
        if chosen == holder or chosen in lineage([holder], entries):
            needed = "it" if holder == chosen else f"{holder}, which was made from it,"
            raise InputError(f"{chosen} cannot be removed: {needed} has {' and '.join(names)}", _release(store, holder))
    if chosen.partition("/")[2] in _in_use() or not remove_artifact(store, chosen):
        raise InputError(f"{chosen} is in use by a run", "wait for the run to end")
    _print_change(json_, "removed", chosen)
    return 0


@app.command
def gc(*, limit: Limit = "10GB", dry_run: DryRun = False, json_: Json = False) -> int:
    """Remove artifacts from this machine, oldest first, until the rest fits the limit.

    Keeps pinned and aliased artifacts, artifacts in use by a run, and everything they were made from. Removes local
    copies of artifacts in the shared root first; never removes artifacts from the shared root. Also removes leftovers
    of killed runs that are older than a day, in both places.
    """
    from moray.platform.core.units import parse_size, size
    from moray.platform.store.sweep import delete_discarded, free_artifact

    allowed, store = parse_size(limit), _store()
    left = _leftovers(store, remove=not dry_run)
    broken = store.aliases.damaged()
    chosen, total = _chosen(store, allowed, broken)
    damaged = store.damaged()
    if not dry_run:
        delete_discarded(store)
        chosen = [entry for entry in chosen if free_artifact(store, entry.reference)]
    freed = sum(entry.bytes for entry in chosen)
    kept = total - freed
    if json_:
        removed = [entry.reference for entry in chosen]
        names = [*(one.reference for one in damaged), *broken]
        print_json(
            {
                "removed": removed,
                "leftovers": left,
                "freed_bytes": freed,
                "kept_bytes": kept,
                "limit_bytes": allowed,
                "dry_run": dry_run,
                "damaged": names,
            }
        )
    else:
        if chosen:
            print_table(("artifact", "size>", "made"), [(e.reference, size(e.bytes), _when(e.made)) for e in chosen])
        for name in left:
            out().print(f"leftover of a killed run: {name}", markup=False)
        verb = "would free" if dry_run else "freed"
        out().print(f"{verb} {size(freed)}; {size(kept)} of {size(allowed)} remain", markup=False)
    _print_damaged(damaged, broken)
    if damaged or broken:
        err().print(
            "a damaged artifact or alias may need any artifact, so only local copies of shared ones are removed"
        )
    if kept > allowed:
        err().print(
            f"still {size(kept - allowed)} over the limit: the remaining artifacts are pinned, aliased or in use",
            markup=False,
        )
    return 0


def _chosen(store: ArtifactStore, allowed: int, broken: list[str]) -> tuple[list[Entry], int]:
    """Returns the local artifacts that gc may remove, and the total bytes on this machine. broken: damaged aliases."""
    from moray.platform.store.retention import to_free, to_remove
    from moray.platform.store.search import local_artifacts

    local = {artifact.reference for artifact in local_artifacts(store)}
    entries = [entry for entry in _entries(store) if entry.reference in local]
    used = _in_use()
    working = [e.reference for e in entries if e.reference.partition("/")[2] in used]
    copies = to_free(entries, [*store.pins.all(), *working], allowed)
    rest = [entry for entry in entries if entry not in copies]
    total = sum(entry.bytes for entry in entries)
    if store.damaged() or broken:  # their ancestors are unknown
        return copies, total
    return [*copies, *to_remove(rest, [*_names(store), *working], allowed)], total


def _leftovers(store: ArtifactStore, remove: bool) -> list[str]:
    """Leftovers of killed runs that are older than a day: local folders, and objects in the shared root."""
    from moray.platform.store.sweep import free_artifact, leftovers

    before = time.time() - _DAY_SECONDS
    local = leftovers(store, before)
    remote = sorted(store.remote.leftovers(before)) if store.remote else []
    if remove:
        local = [name for name in local if free_artifact(store, name)]
        if store.remote:
            store.remote.sweep(before)
    return [*local, *(f"{store.remote.url}/{name}" for name in remote if store.remote)]


def _locations(store: ArtifactStore) -> dict[str, tuple[Artifact, str]]:
    """Every artifact with its location (local, remote or both), by step, newest first."""
    from moray.platform.store.search import local_artifacts, shared_artifacts

    local = {artifact.reference: artifact for artifact in local_artifacts(store)}
    remote = {artifact.reference: artifact for artifact in shared_artifacts(store)}
    every = sorted((remote | local).values(), key=lambda a: (a.manifest.step, -a.manifest.started))
    names = [a.reference for a in every]
    where = {n: "both" if n in local and n in remote else "local" if n in local else "remote" for n in names}
    return {a.reference: (a, where[a.reference]) for a in every}


def _store() -> ArtifactStore:
    from moray.platform.core.home import Home
    from moray.platform.store.artifacts import ArtifactStore

    return ArtifactStore(Home.from_environment())


def _in_use() -> set[str]:
    from moray.platform.core.home import Home
    from moray.platform.run.history import in_use

    return in_use(Home.from_environment())


def _entries(store: ArtifactStore) -> list[Entry]:
    from moray.platform.store.retention import Entry

    return [
        Entry(a.reference, a.manifest.bytes, a.manifest.started, tuple(a.manifest.inputs.values()), where != "local")
        for a, where in _locations(store).values()
    ]


def _names(store: ArtifactStore) -> dict[str, list[str]]:
    """The pins and aliases of artifacts: reference -> `alias NAME@VERSION`, `a pin`."""
    found: dict[str, list[str]] = {}
    for alias, reference in store.aliases.all().items():
        found.setdefault(reference, []).append(f"alias {alias}")
    for reference in store.pins.all():
        found.setdefault(reference, []).append("a pin")
    return found


def _release(store: ArtifactStore, reference: str) -> str:
    """The command that removes a pin or an alias of an artifact."""
    if reference in store.pins.all():
        return f"moray artifacts unpin {reference}"
    alias = next(name for name, target in store.aliases.all().items() if target == reference)
    return f"moray artifacts unalias {alias}"


def _print_damaged(damaged: list[DamagedError], aliases: list[str]) -> None:
    """Prints damaged artifacts and aliases to stderr, each with its fix."""
    for one in damaged:
        err().print(f"{one.message}\n  {one.hint}", markup=False, soft_wrap=True)
    for alias in aliases:
        err().print(f"alias {alias} names no artifact\n  moray artifacts unalias {alias}", markup=False, soft_wrap=True)


def _when(made: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(made))


def _print_change(json_: bool, action: str, reference: str) -> None:
    if json_:
        print_json({action: reference})
    else:
        out().print(f"{action} {reference}", markup=False)
