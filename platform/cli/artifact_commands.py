"""`moray artifacts`: what is kept, and what may go."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from moray.platform.run.console import Json, err, out, print_json, print_table

if TYPE_CHECKING:
    from moray.platform.store.artifacts import Artifact, ArtifactStore
    from moray.platform.store.manifest import DamagedError
    from moray.platform.store.retention import Entry

_DAY_SECONDS = 24 * 3600.0  # what is older and belongs to nobody was left behind

app = App(name="artifacts", help="Show, pin and remove what runs made.", help_format="plaintext")

Limit = Annotated[str, Parameter(help="what may remain, for example 500MB or 1.5TiB")]
DryRun = Annotated[bool, Parameter(negative=(), help="say what would go, and remove nothing")]


@app.command(name="list")
def list_artifacts(*, json_: Json = False) -> int:
    """Every artifact, by step, newest first, with what holds it (pin, aliases) and where it is.

    With a shared root (MORAY_ARTIFACTS): local, remote or both.
    """
    from moray.platform.core.units import size

    store = _store()
    names, places = _names(store), _places(store)
    artifacts = [artifact for artifact, _ in places.values()]
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
            "where": places[artifact.reference][1],
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
            places[a.reference][1],
            ", ".join(names.get(a.reference, [])),
            a.manifest.run,
        )
        for a in artifacts
    ]
    print_table(("artifact", "is", "size>", "made", "where", "held by", "run"), shown)
    _say_damaged(damaged, store.aliases.damaged())
    return 0


@app.command
def verify(
    reference: str = "",
    /,
    *,
    hashes: Annotated[bool, Parameter(negative=(), help="compare contents too, not only sizes")] = False,
    json_: Json = False,
) -> int:
    """Compare the files of artifacts on this machine with their manifests. Exit 1 if any differ.

    REFERENCE is an alias, STEP/FINGERPRINT (a unique beginning is enough) or a folder; without it, all.
    """
    from moray.platform.core.units import size
    from moray.platform.store.search import artifacts_here, find_artifact

    store = _store()
    chosen = [find_artifact(store, reference)] if reference else list(artifacts_here(store))
    artifacts = [artifact for artifact in chosen if artifact.here]
    rows = _verified(artifacts, hashes)
    rows += (
        [] if reference else [{"artifact": one.reference, "file": "", "what": one.message} for one in store.damaged()]
    )
    if json_:
        print_json({"artifacts": len(artifacts), "hashes": hashes, "changes": rows})
    else:
        for row in rows:
            place = f"{row['artifact']}/{row['file']}: " if row["file"] else ""
            out().print(f"{place}{row['what']}", markup=False, soft_wrap=True)
        what = "sizes and contents" if hashes else "sizes"
        total = size(sum(artifact.manifest.bytes for artifact in artifacts))
        out().print(f"{len(artifacts)} artifacts ({total}): {what} compared, {len(rows)} differences", markup=False)
        if reference and not artifacts:
            err().print("its files are not on this machine; what is fetched is checked then", markup=False)
    return 1 if rows else 0


def _verified(artifacts: list[Artifact], hashes: bool) -> list[dict[str, str]]:
    """A row for each file that differs, with progress where there are many bytes to read."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from moray.platform.store.verify import changes

    columns = (TextColumn("verifying"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    rows = []
    with Progress(*columns, console=err(), transient=True, disable=not hashes) as progress:
        task = progress.add_task("", total=sum(artifact.manifest.bytes for artifact in artifacts))
        for artifact in artifacts:
            for change in changes(artifact.folder, artifact.manifest, hashes, lambda n: progress.advance(task, n)):
                rows.append({"artifact": artifact.reference, "file": change.path, "what": change.what})
    return rows


@app.command
def pin(reference: str, /, *, json_: Json = False) -> int:
    """Keep an artifact, and everything it was made from, out of `gc`.

    REFERENCE is an alias, STEP/FINGERPRINT (a unique beginning is enough) or a folder.
    """
    from moray.platform.store.search import find_artifact

    store = _store()
    chosen = find_artifact(store, reference).reference
    store.pins.add(chosen)
    _say(json_, "pinned", chosen)
    return 0


@app.command
def unpin(reference: str, /, *, json_: Json = False) -> int:
    """Undo `pin`."""
    from moray.platform.store.search import find_artifact

    store = _store()
    chosen = find_artifact(store, reference).reference
    store.pins.drop(chosen)
    _say(json_, "unpinned", chosen)
    return 0


@app.command
def unalias(alias: str, /, *, json_: Json = False) -> int:
    """Forget NAME@VERSION; the artifact stays, until nothing else holds it."""
    _store().aliases.drop(alias)
    _say(json_, "forgotten", alias)
    return 0


@app.command
def rm(reference: str, /, *, json_: Json = False) -> int:
    """Remove one artifact, from the shared root too. What a pin or an alias needs is refused."""
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
            needed = "" if holder == chosen else f"{holder} was made from it and "
            raise InputError(f"{chosen} must stay: {needed}has {' and '.join(names)}", _release(store, holder))
    if chosen.partition("/")[2] in _in_use() or not remove_artifact(store, chosen):
        raise InputError(f"{chosen} is used by a run", "wait for the run to end")
    _say(json_, "removed", chosen)
    return 0


@app.command
def gc(*, limit: Limit = "10GB", dry_run: DryRun = False, json_: Json = False) -> int:
    """Remove artifacts from this machine, oldest first, until the rest fits the limit.

    Pinned and aliased artifacts, those that a run works on, and all they were made from stay. Copies of what lies in
    the shared root go first; no artifact is removed there. What killed runs left behind goes after a day, there too.
    """
    from moray.platform.core.units import parse_size, size
    from moray.platform.store.sweep import delete_buried, free_artifact

    allowed, store = parse_size(limit), _store()
    left = _leftovers(store, remove=not dry_run)
    broken = store.aliases.damaged()
    chosen, total = _chosen(store, allowed, broken)
    damaged = store.damaged()
    if not dry_run:
        delete_buried(store)
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
            out().print(f"left behind: {name}", markup=False)
        verb = "would free" if dry_run else "freed"
        out().print(f"{verb} {size(freed)}; {size(kept)} of {size(allowed)} remain", markup=False)
    _say_damaged(damaged, broken)
    if damaged or broken:
        err().print("only copies of what the shared root has may go while something is damaged: it may need the rest")
    if kept > allowed:
        err().print(f"still {size(kept - allowed)} over the limit: the rest is pinned, aliased or in use", markup=False)
    return 0


def _chosen(store: ArtifactStore, allowed: int, broken: list[str]) -> tuple[list[Entry], int]:
    """What gc may remove from this machine, and how many bytes lie on it. broken: damaged aliases."""
    from moray.platform.store.retention import to_free, to_remove
    from moray.platform.store.search import artifacts_here

    here = {artifact.reference for artifact in artifacts_here(store)}
    entries = [entry for entry in _entries(store) if entry.reference in here]
    used = _in_use()
    working = [e.reference for e in entries if e.reference.partition("/")[2] in used]
    copies = to_free(entries, [*store.pins.all(), *working], allowed)
    rest = [entry for entry in entries if entry not in copies]
    total = sum(entry.bytes for entry in entries)
    if store.damaged() or broken:  # what those were made from is not known
        return copies, total
    return [*copies, *to_remove(rest, [*_names(store), *working], allowed)], total


def _leftovers(store: ArtifactStore, remove: bool) -> list[str]:
    """What killed runs left behind more than a day ago: folders here, and objects in the shared root."""
    from moray.platform.store.sweep import free_artifact, leftovers

    before = time.time() - _DAY_SECONDS
    here = leftovers(store, before)
    there = sorted(store.remote.leftovers(before)) if store.remote else []
    if remove:
        here = [name for name in here if free_artifact(store, name)]
        if store.remote:
            store.remote.sweep(before)
    return [*here, *(f"{store.remote.url}/{name}" for name in there if store.remote)]


def _places(store: ArtifactStore) -> dict[str, tuple[Artifact, str]]:
    """Every artifact, and whether it is local, remote or both; by step, newest first."""
    from moray.platform.store.search import artifacts_here, shared_artifacts

    here = {artifact.reference: artifact for artifact in artifacts_here(store)}
    there = {artifact.reference: artifact for artifact in shared_artifacts(store)}
    every = sorted((there | here).values(), key=lambda a: (a.manifest.step, -a.manifest.started))
    names = [a.reference for a in every]
    where = {n: "both" if n in here and n in there else "local" if n in here else "remote" for n in names}
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
        for a, where in _places(store).values()
    ]


def _names(store: ArtifactStore) -> dict[str, list[str]]:
    """What holds an artifact, in words: reference -> `alias NAME@VERSION`, `a pin`."""
    found: dict[str, list[str]] = {}
    for alias, reference in store.aliases.all().items():
        found.setdefault(reference, []).append(f"alias {alias}")
    for reference in store.pins.all():
        found.setdefault(reference, []).append("a pin")
    return found


def _release(store: ArtifactStore, reference: str) -> str:
    """How to give up what holds an artifact."""
    if reference in store.pins.all():
        return f"moray artifacts unpin {reference}"
    alias = next(name for name, target in store.aliases.all().items() if target == reference)
    return f"moray artifacts unalias {alias}"


def _say_damaged(damaged: list[DamagedError], aliases: list[str]) -> None:
    """What is passed over, by name, with the fix; on stderr."""
    for one in damaged:
        err().print(f"{one.message}\n  {one.hint}", markup=False, soft_wrap=True)
    for alias in aliases:
        err().print(f"alias {alias} names no artifact\n  moray artifacts unalias {alias}", markup=False, soft_wrap=True)


def _when(made: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(made))


def _say(json_: bool, what: str, reference: str) -> None:
    if json_:
        print_json({what: reference})
    else:
        out().print(f"{what} {reference}", markup=False)
