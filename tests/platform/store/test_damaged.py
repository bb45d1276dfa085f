"""A damaged file in MORAY_HOME affects only its artifact: it is reported with its fix, and all others stay usable."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moray.platform.cli import main
from moray.platform.core.errors import InputError
from moray.platform.core.home import Home
from moray.platform.store import verify
from moray.platform.store.artifacts import Artifact, ArtifactStore
from moray.platform.store.manifest import MANIFEST, DamagedError, hash_folder
from moray.platform.store.search import artifact_by_fingerprint, find_artifact, local_artifacts, newest_artifact
from moray.platform.store.sweep import remove_artifact
from moray.platform.store.verify import Change, changes, check_sizes
from tests.platform.store.test_artifacts import manifest

ONE, OTHER = "ab" * 16, "cd" * 16


@pytest.fixture
def store(home: Home, monkeypatch: pytest.MonkeyPatch) -> ArtifactStore:
    """Two artifacts of one step."""
    monkeypatch.setenv("MORAY_HOME", str(home.root))
    made = ArtifactStore(home)
    for number, fingerprint in enumerate((ONE, OTHER)):
        folder = made.prepare("filter", fingerprint, keep_leftovers=False)
        (folder / "data").write_text(f"words {number}")
        files = hash_folder(folder)
        made.commit(manifest(fingerprint=fingerprint, files=files, bytes=7, started=float(number)))
    return made


def other(store: ArtifactStore) -> Artifact:
    found = store.local("filter", OTHER)
    assert found is not None
    return found


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def replaced_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def foreign(path: Path) -> None:
    path.write_bytes((path.parent.parent / OTHER / MANIFEST).read_bytes())


DAMAGES: list[Callable[[Path], object]] = [
    lambda path: path.write_bytes(b""), cut, lambda path: path.write_text("<html>"), replaced_by_a_folder, foreign,
    lambda path: path.write_text("[]"), lambda path: path.write_bytes(b"\xff\xfe"),
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest_affects_only_its_artifact(
    store: ArtifactStore, damage: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(store.folder("filter", ONE) / MANIFEST)
    with pytest.raises(DamagedError) as caught:
        store.get("filter", ONE)
    assert str(store.folder("filter", ONE) / MANIFEST) in caught.value.message
    assert f"moray artifacts rm filter/{ONE}" in caught.value.hint
    assert [one.fingerprint for one in local_artifacts(store)] == [OTHER]
    assert newest_artifact(store, "filter") == other(store)
    assert artifact_by_fingerprint(store, ONE) is None
    assert find_artifact(store, "filter/cd") == other(store)
    for command in (["artifacts", "list"], ["artifacts", "gc", "--dry-run"]):
        assert main.app(command, exit_on_error=False, result_action="return_value") == 0
        shown = capsys.readouterr()
        assert f"moray artifacts rm filter/{ONE}" in shown.err.replace("\n", "")
    assert main.app(["artifacts", "rm", "filter/ab"], exit_on_error=False, result_action="return_value") == 0
    assert store.get("filter", ONE) is None
    assert store.damaged() == []
    assert store.get("filter", OTHER) == other(store)


def test_gc_removes_nothing_that_a_damaged_artifact_may_need(
    store: ArtifactStore, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it was made from is not known: the ancestors of a pinned artifact went."""
    store.pins.add(f"filter/{OTHER}")
    cut(store.folder("filter", OTHER) / MANIFEST)
    command = ["artifacts", "gc", "--limit", "0B"]
    assert main.app(command, exit_on_error=False, result_action="return_value") == 0
    assert store.local("filter", ONE) is not None
    assert "a damaged artifact or alias" in capsys.readouterr().err.replace("\n", " ")
    store.pins.drop(f"filter/{OTHER}")
    remove_artifact(store, f"filter/{OTHER}")
    assert main.app(command, exit_on_error=False, result_action="return_value") == 0
    assert store.local("filter", ONE) is None


def test_the_hint_for_an_unreadable_file_is_not_to_remove_it(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user's file, or a file server that does not answer: it may be whole."""
    real = Path.read_bytes

    def refused(path: Path) -> bytes:
        if path == store.folder("filter", ONE) / MANIFEST:
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(DamagedError, match="Permission denied") as caught:
        store.get("filter", ONE)
    assert " rm " not in caught.value.hint
    assert [one.fingerprint for one in local_artifacts(store)] == [OTHER]
    assert len(store.damaged()) == 1


@pytest.mark.parametrize("content", [b"", b"../../etc/passwd", b"\xff", b"<html>\n", b"filter/"])
def test_a_damaged_alias_affects_only_itself(store: ArtifactStore, home: Home, content: bytes) -> None:
    store.aliases.set("good", "newest", f"filter/{OTHER}")
    (home.aliases / "bad@newest").write_bytes(content)
    (home.aliases / "folder@newest").mkdir()
    assert store.aliases.all() == {"good@newest": f"filter/{OTHER}"}
    assert store.aliases.damaged() == ["bad@newest", "folder@newest"]
    with pytest.raises(InputError, match="alias bad@newest is damaged") as caught:
        find_artifact(store, "bad@newest")
    assert caught.value.hint == "remove it: moray artifacts unalias bad@newest"
    store.aliases.drop("bad@newest")
    assert store.aliases.damaged() == ["folder@newest"]
    with pytest.raises(InputError, match="folder@newest"):
        store.aliases.drop("folder@newest")


def unreadable(path: Path) -> str:
    raise OSError(5, "Input/output error")


def changed(store: ArtifactStore, hashes: bool) -> list[Change]:
    artifact = other(store)
    return list(changes(artifact.folder, artifact.manifest, hashes, lambda _: None))


def test_verify_finds_external_changes(
    store: ArtifactStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = store.folder("filter", OTHER) / "data"
    assert changed(store, hashes=True) == []
    data.write_text("WORDS 1")
    assert changed(store, hashes=False) == []
    assert changed(store, hashes=True) == [Change("data", "has different contents")]
    data.write_text("words")
    (data.parent / "more").write_text("")
    assert changed(store, hashes=False) == [
        Change("data", "has 5 B instead of 7 B"),
        Change("more", "is not in the manifest"),
    ]
    with pytest.raises(InputError, match="has 5 B instead of 7 B"):
        check_sizes(data.parent, other(store).manifest, lambda: False)
    monkeypatch.setattr(verify, "hash_file", unreadable)
    data.write_text("words 1")
    assert changed(store, hashes=True)[0] == Change("data", "cannot be read: Input/output error")
    data.unlink()
    assert changed(store, hashes=False)[0] == Change("data", "is missing")
    code = main.app(["artifacts", "verify", "--json"], exit_on_error=False, result_action="return_value")
    said = json.loads(capsys.readouterr().out)
    assert code == 1
    assert said["artifacts"] == 2
    assert {row["what"] for row in said["changes"]} == {"is missing", "is not in the manifest"}
