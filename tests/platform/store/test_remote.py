"""A shared root in S3: several machines see the same artifacts, complete or not at all, under any fault."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from moray.platform import api
from moray.platform.core.atomic import write_text
from moray.platform.core.errors import InputError, StepFailed
from moray.platform.core.events import NoteEvent
from moray.platform.core.home import Home
from moray.platform.plan.context import StepContext
from moray.platform.run import doctor
from moray.platform.run.runner import plan_steps
from moray.platform.store.artifacts import ArtifactStore
from moray.platform.store.bucket import Bucket
from moray.platform.store.lease import Lease
from moray.platform.store.manifest import MANIFEST, DamagedError, hash_folder
from moray.platform.store.search import find_artifact, local_artifacts, shared_artifacts
from moray.platform.store.sweep import remove_artifact
from tests.faults.test_kill import wait_for
from tests.platform.run.test_history import Shell
from tests.platform.run.test_runner import recipe, run
from tests.platform.store.test_artifacts import manifest
from tests.s3 import BUCKET, Fault, Request, faulty_proxy, keys
from tests.small_disk import empty, fill, small_disk

pytestmark = pytest.mark.s3  # a real S3 server

FINGERPRINT = "ab" * 16


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk") as folder:
        yield folder


@pytest.fixture
def machines(s3: Any, tmp_path: Path) -> Callable[[str], Home]:
    """Homes that share a root: one for each name."""

    def machine(name: str) -> Home:
        (tmp_path / name).mkdir(exist_ok=True)
        return Home(tmp_path / name, f"s3://{BUCKET}/root")

    return machine


@pytest.fixture
def through(s3_url: str, s3: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[Fault], Any]:
    """What Moray asks within the block passes a proxy with these faults."""

    @contextmanager
    def within(fault: Fault) -> Iterator[None]:
        with faulty_proxy(s3_url, fault) as url, monkeypatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", url)
            yield

    return within


def files(client: Any) -> list[str]:
    """The keys of artifacts' files, without their manifests."""
    return [key for key in keys(client) if "/w-" in key]


def make(home: Home, text: str, name: str = "out") -> tuple[ArtifactStore, Any]:
    """A store with one file written, and its manifest, not committed yet."""
    store = ArtifactStore(home)
    folder = store.prepare("filter", FINGERPRINT, keep_leftovers=False)
    (folder / name).write_text(text)
    entries = hash_folder(folder)
    return store, manifest(fingerprint=FINGERPRINT, files=entries, bytes=sum(e.size for e in entries))


def test_another_machine_reuses_everything_and_pulls_only_needed_files(machines: Callable[[str], Home]) -> None:
    made, _ = run(machines("one"), recipe("a", "b", "c"))
    two = machines("two")
    decisions = plan_steps(recipe("a", "b", "c"), ArtifactStore(two))
    assert [d.reuse for d in decisions] == [True] * 3
    assert all(d.why.endswith(f" in s3://{BUCKET}/root") for d in decisions)
    again, _ = run(two, recipe("a", "b", "c"))
    assert [row.reused for row in again.steps.values()] == [True] * 3
    assert not list(local_artifacts(ArtifactStore(two))), "nobody needed a file"
    changed, _ = run(two, recipe("a", "b", "C"))
    assert [row.reused for row in changed.steps.values()] == [True, True, False]
    assert (changed.steps["s2"].artifact.folder / "out").read_text() == "abC"
    pulled = [a.fingerprint for a in local_artifacts(ArtifactStore(two)) if a.manifest.config["text"] == "b"]
    assert pulled == [made.steps["s1"].artifact.fingerprint]
    assert ArtifactStore(two).local("write", pulled[0]) == ArtifactStore(two).get("write", pulled[0])
    back = plan_steps(recipe("a", "b", "C"), ArtifactStore(machines("one")))
    assert [d.reuse for d in back] == [True] * 3


def test_local_artifacts_are_uploaded_when_a_run_reuses_them(machines: Callable[[str], Home], s3: Any) -> None:
    run(Home(machines("one").root), recipe("a"))
    assert files(s3) == []
    result, _ = run(machines("one"), recipe("a"))
    assert result.steps["s0"].reused
    assert len(files(s3)) == 1


def test_aliases_and_models_reach_another_machine(machines: Callable[[str], Home]) -> None:
    store, wanted = make(machines("one"), "{}", "config.json")
    store.aliases.set("demo", "newest", store.commit(wanted.model_copy(update={"produces": "model"})).reference)
    two = machines("two")
    found = find_artifact(ArtifactStore(two), "demo@newest")
    assert not found.is_local
    assert (api.model_folder("demo@newest", two) / "config.json").read_text() == "{}"
    assert found.is_local
    ArtifactStore(two).aliases.drop("demo@newest")
    assert ArtifactStore(machines("three")).aliases.all() == {}
    with pytest.raises(InputError, match="unknown alias 'demo@newest'"):
        ArtifactStore(two).aliases.drop("demo@newest")


def test_of_two_writers_one_wins_and_both_have_its_bytes(
    machines: Callable[[str], Home], s3: Any, through: Callable[[Fault], Any]
) -> None:
    """Both have uploaded their files before either may create the manifest."""
    both = threading.Barrier(2)

    def together(request: Request) -> str:
        if request.method == "PUT" and request.key.endswith("/manifest.json"):
            both.wait(60)
        return "pass"

    with through(together):
        prepared = [make(machines(name), name) for name in ("one", "two")]
        threads = [threading.Thread(target=store.commit, args=[wanted]) for store, wanted in prepared]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    artifacts = [store.local("filter", FINGERPRINT) for store, _ in prepared]
    assert artifacts[0] is not None
    assert artifacts[1] is not None
    assert artifacts[0].manifest == artifacts[1].manifest
    texts = {(artifact.folder / "out").read_text() for artifact in artifacts if artifact}
    assert len(texts) == 1
    assert texts <= {"one", "two"}
    assert len(files(s3)) == 1, "the loser's files are gone"


def test_files_without_a_manifest_are_invisible(
    machines: Callable[[str], Home], s3: Any, through: Callable[[Fault], Any]
) -> None:
    seen: list[object] = []

    def look(request: Request) -> str:
        if request.method == "PUT" and request.key.endswith("/manifest.json"):
            assert len(files(s3)) == 1
            seen.append(reader.get("filter", FINGERPRINT))
        return "pass"

    reader = ArtifactStore(machines("two"))
    with through(look):
        store, wanted = make(machines("one"), "x")
        store.commit(wanted)
    assert seen == [None]
    assert reader.get("filter", FINGERPRINT) is not None


def test_an_upload_killed_midway_leaves_nothing_and_is_made_good(
    machines: Callable[[str], Home], s3: Any, through: Callable[[Fault], Any]
) -> None:
    second, hold = threading.Event(), threading.Event()
    uploads = itertools.count()

    def stall(request: Request) -> str:
        if request.method == "PUT" and "/w-" in request.key and next(uploads) == 1:
            second.set()
            hold.wait(60)
        return "pass"

    code = (
        "import sys\nfrom pathlib import Path\nfrom moray.platform.core.home import Home\n"
        "from tests.platform.store.test_remote import upload_two\n"
        f"upload_two(Home(Path({str(machines('one').root)!r}), {machines('one').shared!r}))"
    )
    with (
        through(stall),
        subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": "."}) as victim,
    ):
        assert second.wait(60)
        wait_for(lambda: len(files(s3)) == 1, "the arrival of the first file")
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        hold.set()
    assert ArtifactStore(machines("two")).get("filter", FINGERPRINT) is None
    upload_two(machines("one"))
    found = find_artifact(ArtifactStore(machines("two")), f"filter/{FINGERPRINT}")
    fetched = ArtifactStore(machines("two")).fetch(found)
    assert {path.name for path in fetched.folder.iterdir()} == {"a", "b", "manifest.json"}
    remote = ArtifactStore(machines("two")).remote
    assert remote is not None
    assert remote.sweep(before=time.time() - 3600) == [], "it might still be at it"
    assert len(remote.sweep(before=time.time() + 3600)) == 1
    assert len(files(s3)) == 2, "the artifact's own files stay"


def upload_two(home: Home) -> None:
    store = ArtifactStore(home)
    folder = store.prepare("filter", FINGERPRINT, keep_leftovers=False)
    for name in ("a", "b"):
        (folder / name).write_text(name * 1000)
    store.commit(manifest(fingerprint=FINGERPRINT, files=hash_folder(folder)))


@pytest.mark.parametrize("fault", ["drop", "mute", (503, "<Error><Code>SlowDown</Code></Error>"), (500, "")])
def test_failing_requests_are_repeated(
    machines: Callable[[str], Home], through: Callable[[Fault], Any], fault: Any, s3: Any
) -> None:
    """The first request for each key fails. A lost answer to the manifest's creation must not be taken for a rival."""
    met: set[tuple[str, str]] = set()

    def first(request: Request) -> Any:
        name = (request.method, request.path)
        spoil = name not in met and request.method in ("PUT", "GET", "HEAD")
        met.add(name)
        return fault if spoil else "pass"

    with through(first):
        made, _ = run(machines("one"), recipe("a", "b"))
        changed, _ = run(machines("two"), recipe("a", "b", "c"))
    assert (changed.steps["s2"].artifact.folder / "out").read_text() == "abc"
    assert [row.reused for row in changed.steps.values()] == [True, True, False]
    assert len(files(s3)) == 3
    assert (
        made.steps["s1"].artifact.manifest
        == ArtifactStore(machines("two")).get("write", made.steps["s1"].artifact.fingerprint).manifest
    )  # type: ignore[union-attr]


def test_a_body_that_breaks_off_is_asked_for_again(
    machines: Callable[[str], Home], through: Callable[[Fault], Any]
) -> None:
    run(machines("one"), recipe("abcdefgh"))
    met: set[str] = set()

    def break_off(request: Request) -> str:
        spoil = request.method == "GET" and "?" not in request.path and request.path not in met
        met.add(request.path)
        return "half" if spoil else "pass"

    with through(break_off):
        result, _ = run(machines("two"), recipe("abcdefgh", "i"))
    assert (result.steps["s1"].artifact.folder / "out").read_text() == "abcdefghi"
    assert any("/w-" in path for path in met)


@pytest.mark.parametrize(("damage", "word"), [("bitten", "corrupt"), ("short", "short or missing"), (None, "missing")])
def test_a_damaged_object_is_named_and_never_taken_for_whole(
    machines: Callable[[str], Home], s3: Any, damage: str | None, word: str
) -> None:
    run(machines("one"), recipe("letter"))
    (key,) = files(s3)
    if damage is None:
        s3.delete_object(Bucket=BUCKET, Key=key)
    else:
        s3.put_object(Bucket=BUCKET, Key=key, Body=damage.encode())
    with pytest.raises(StepFailed) as caught:
        run(machines("two"), recipe("letter", "b"))
    assert f"s3://{BUCKET}/{key}" in caught.value.message
    assert word in caught.value.message
    assert "artifacts rm write/" in caught.value.hint
    assert not list(local_artifacts(ArtifactStore(machines("two"))))
    assert not list(machines("two").artifacts.glob("*/.*.pull-*")), "nothing half-pulled is left"
    store = ArtifactStore(machines("two"))
    assert remove_artifact(store, "/".join(key.split("/")[1:3]))
    again, _ = run(Home(machines("two").root, machines("two").shared), recipe("letter", "b"))
    assert (again.steps["s1"].artifact.folder / "out").read_text() == "letterb"


def test_an_outage_at_the_end_of_a_step_loses_no_work(
    machines: Callable[[str], Home], s3: Any, through: Callable[[Fault], Any]
) -> None:
    denied = (403, "<Error><Code>AccessDenied</Code><Message>no</Message></Error>")

    def no_files(request: Request) -> Any:
        return denied if request.method == "PUT" and "/w-" in request.key else "pass"

    with through(no_files), pytest.raises(StepFailed, match="access denied"):
        run(machines("one"), recipe("a"))
    result, _ = run(machines("one"), recipe("a"))
    assert result.steps["s0"].reused
    assert ArtifactStore(machines("two")).get("write", result.steps["s0"].artifact.fingerprint) is not None


def refused(home: Home) -> InputError:
    """The error of a run that must not have begun."""
    with pytest.raises(InputError) as caught:
        run(home, recipe("a"))
    assert caught.value.exit_code == 2
    assert caught.value.hint
    assert not home.runs.exists()
    return caught.value


@pytest.mark.parametrize("url", ["s3://", "bucket/prefix", "http://bucket/x", "s3://bucket/x?y=1"])
def test_a_bad_url_is_refused(url: str, home: Home) -> None:
    with pytest.raises(InputError, match="is not an artifact root") as caught:
        ArtifactStore(Home(home.root, url))
    assert "s3://bucket/prefix" in caught.value.hint


def test_errors_of_the_root_are_reported_before_anything_starts(
    home: Home, s3: Any, monkeypatch: pytest.MonkeyPatch, through: Callable[[Fault], Any]
) -> None:
    shared = f"s3://{BUCKET}/root"
    assert "s3://nobodys/root: the bucket does not exist" in refused(Home(home.root, "s3://nobodys/root")).message
    with monkeypatch.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(home.root / "none"))
        patch.setenv("AWS_CONFIG_FILE", str(home.root / "none"))
        assert "no credentials" in refused(Home(home.root, shared)).message
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        assert "does not respond" in refused(Home(home.root, shared)).message
    for code, words in (("AccessDenied", "access denied"), ("InvalidAccessKeyId", "invalid credentials")):
        with through(lambda request, code=code: (403, f"<Error><Code>{code}</Code></Error>")):  # type: ignore[misc]
            assert words in refused(Home(home.root, shared)).message


def test_a_root_that_cannot_be_written_or_replaces_silently_is_refused(
    home: Home, s3: Any, through: Callable[[Fault], Any]
) -> None:
    def read_only(request: Request) -> Any:
        return (403, "<Error><Code>AccessDenied</Code></Error>") if request.method == "PUT" else "pass"

    def careless(request: Request) -> str:
        request.headers.pop("If-None-Match", None)
        return "pass"

    with through(read_only):
        assert "access denied" in refused(Home(home.root, f"s3://{BUCKET}/root")).message
    with through(careless):
        assert "ignores If-None-Match" in refused(Home(home.root, f"s3://{BUCKET}/root")).message


def test_the_doctor_looks_at_the_root_when_there_is_one(
    machines: Callable[[str], Home], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MORAY_HOME", str(machines("one").root))
    assert "artifact root" not in [found.name for found in doctor.examine()]
    monkeypatch.setenv("MORAY_ARTIFACTS", machines("one").shared)
    assert {found.name: found.state for found in doctor.examine()}["artifact root"] == "ok"
    monkeypatch.setenv("MORAY_ARTIFACTS", "s3://nobodys")
    (found,) = [found for found in doctor.examine() if found.name == "artifact root"]
    assert (found.state, "does not exist" in found.detail) == ("fail", True)


def test_list_gc_and_rm_know_where_things_are(
    machines: Callable[[str], Home], s3: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = machines("one")
    monkeypatch.setenv("MORAY_HOME", str(home.root))
    moray = Shell(home, capsys)
    old, _ = run(Home(home.root), recipe("z"))
    monkeypatch.setenv("MORAY_ARTIFACTS", home.shared)
    made, _ = run(home, recipe("a", "b"))
    references = [row.artifact.reference for row in made.steps.values()]
    store = ArtifactStore(home)
    store.aliases.set("demo", "newest", references[1])
    where = lambda: {row["artifact"]: row["where"] for row in moray.json("artifacts", "list")}  # noqa: E731
    alone = old.steps["s0"].artifact.reference
    assert where() == {alone: "local", references[0]: "both", references[1]: "both"}
    assert moray.json("artifacts", "gc", "--limit", "3")["removed"] == references[:1], "a copy goes before an original"
    assert where() == {alone: "local", references[0]: "remote", references[1]: "both"}
    assert moray.json("artifacts", "gc", "--limit", "0")["removed"] == [references[1], alone], "an alias holds no copy"
    assert where() == {references[0]: "remote", references[1]: "remote"}
    said = moray("artifacts", "rm", references[0], code=2)[1]
    assert "hint: moray artifacts unalias demo@newest" in said
    assert moray.json("artifacts", "unalias", "demo@newest") == {"forgotten": "demo@newest"}
    for reference in references:
        assert moray.json("artifacts", "rm", reference) == {"removed": reference}
    assert where() == {}
    assert files(s3) == []


def test_leftovers_go_after_a_day(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MORAY_HOME", str(home.root))
    moray, store = Shell(home, capsys), ArtifactStore(home)
    for fingerprint in ("aa", "bb", "cc"):
        (store.prepare("filter", fingerprint, keep_leftovers=False) / "half").write_text("x")
    (home.artifacts / "filter" / f".dd{'.pull-1'}").mkdir()
    for path in [*home.artifacts.glob("filter/*"), *home.artifacts.glob("filter/*/half")]:
        if "bb" not in str(path):
            os.utime(path, (time.time() - 90000, time.time() - 90000))
    lease = Lease(store.lease_path("filter", "cc"))
    assert lease.acquire()
    assert moray.json("artifacts", "gc", "--dry-run")["leftovers"] == ["filter/.dd.pull-1", "filter/aa"]
    assert moray.json("artifacts", "gc")["leftovers"] == ["filter/.dd.pull-1", "filter/aa"]
    assert sorted(path.name for path in home.artifacts.glob("filter/[!.]*")) == ["bb", "cc"], "young, and in work"
    lease.release()


def test_a_run_can_be_read_on_another_machine(
    machines: Callable[[str], Home], s3: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def burst(ctx: StepContext[Any]) -> None:
        raise ZeroDivisionError("by nought")

    with pytest.raises(StepFailed):
        run(machines("one"), recipe("a", "b", during=burst))
    (name,) = [path.name for path in machines("one").runs.iterdir()]
    copied = {key.removeprefix(f"root/runs/{name}/") for key in keys(s3) if "/runs/" in key}
    assert {"recipe.yaml", "logs/s1.traceback.txt"} < copied
    monkeypatch.setenv("MORAY_HOME", str(machines("two").root))
    monkeypatch.setenv("MORAY_ARTIFACTS", machines("two").shared)
    shown = Shell(machines("two"), capsys).json("runs", "show", name)
    assert [(step["step"], step["state"]) for step in shown["steps"]] == [("s0", "succeeded"), ("s1", "failed")]


def test_a_run_whose_folder_cannot_be_uploaded_reports_it_and_ends_normally(
    machines: Callable[[str], Home], through: Callable[[Fault], Any]
) -> None:
    def no_runs(request: Request) -> Any:
        denied = (403, "<Error><Code>AccessDenied</Code></Error>")
        return denied if request.method == "PUT" and "/runs/" in request.key else "pass"

    with through(no_runs):
        _, events = run(machines("one"), recipe("a"))
    notes = [event.text for event in events if isinstance(event, NoteEvent)]
    assert len(notes) == 1
    assert notes[0].startswith("the run's folder was not copied")


def test_large_files_travel_in_parts_and_report_progress(
    machines: Callable[[str], Home], s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moray.platform.store.bucket._QUIET_SECONDS", 0.0)
    store = ArtifactStore(machines("one"))
    folder = store.prepare("filter", FINGERPRINT, keep_leftovers=False)
    (folder / "large").write_bytes(os.urandom(40 << 20))
    (folder / "empty").write_bytes(b"")
    said: list[tuple[str, float, float]] = []
    entries = hash_folder(folder)
    store.commit(manifest(fingerprint=FINGERPRINT, files=entries), lambda *report: said.append(report))
    assert said[-1] == ("uploading", 40 << 20, 40 << 20)
    assert [done for _, done, _ in said] == sorted(done for _, done, _ in said)
    (large,) = [key for key in files(s3) if key.endswith("large")]
    assert "-" in s3.head_object(Bucket=BUCKET, Key=large)["ETag"], "it came in parts"
    two = ArtifactStore(machines("two"))
    fetched = two.fetch(find_artifact(two, f"filter/{FINGERPRINT}"))
    assert hash_folder(fetched.folder) == entries


def test_a_manifest_cannot_lead_out_of_its_folder(machines: Callable[[str], Home], s3: Any) -> None:
    store, wanted = make(machines("one"), "x")
    store.commit(wanted)
    (key,) = [key for key in keys(s3) if key.endswith("/manifest.json")]
    text = json.loads(s3.get_object(Bucket=BUCKET, Key=key)["Body"].read())
    text["files"][0]["path"] = "../../../escaped"
    s3.put_object(Bucket=BUCKET, Key=key, Body=json.dumps(text).encode())
    two = ArtifactStore(machines("two"))
    with pytest.raises(InputError, match="is outside the artifact's folder"):
        two.fetch(find_artifact(two, f"filter/{FINGERPRINT}"))


def test_a_bucket_lists_in_pages_and_deletes_in_batches(s3: Any) -> None:
    bucket = Bucket(f"s3://{BUCKET}/many")
    for i in range(1005):
        s3.put_object(Bucket=BUCKET, Key=f"many/{i:04}", Body=b"")
    names = [item.key for item in bucket.objects()]
    assert names == [f"{i:04}" for i in range(1005)]
    bucket.delete(names)
    assert list(bucket.objects()) == []


def test_a_download_to_a_full_disk_is_a_readable_error(machines: Callable[[str], Home], disk: Path) -> None:
    store, wanted = make(machines("one"), "x" * 200_000)
    store.commit(wanted)
    two = ArtifactStore(Home(disk, machines("one").shared))
    found = find_artifact(two, f"filter/{FINGERPRINT}")
    fill(disk)
    with pytest.raises(InputError, match=r"not enough disk space in .* for filter/abababab \(200 kB\)") as caught:
        two.fetch(found)
    assert "moray artifacts gc" in caught.value.hint
    empty(disk)
    assert hash_folder(two.fetch(found).folder) == wanted.files


def test_a_manifest_damaged_here_is_fetched_again_from_the_shared_root(
    machines: Callable[[str], Home], s3: Any
) -> None:
    """The hint was to remove the artifact, which removed the whole copy too."""
    home = machines("one")
    result, _ = run(home, recipe("a"))
    made = result.steps["s0"].artifact
    (made.folder / MANIFEST).write_bytes(b"")
    store = ArtifactStore(home)
    found = store.get(made.manifest.step, made.fingerprint)
    assert found is not None
    assert list(local_artifacts(store)) == []
    assert "downloaded" in store.damaged()[0].hint
    assert store.fetch(found) == ArtifactStore(home).local(made.manifest.step, made.fingerprint)
    assert store.damaged() == []
    assert len(files(s3)) == 1


def test_damage_in_the_shared_root_affects_only_its_artifact(machines: Callable[[str], Home], s3: Any) -> None:
    result, _ = run(machines("one"), recipe("a", "b"))
    first, second = (row.artifact for row in result.steps.values())
    s3.put_object(Bucket=BUCKET, Key=f"root/{first.reference}/{MANIFEST}", Body=b"<html>log in</html>")
    s3.put_object(Bucket=BUCKET, Key="root/aliases/m@1", Body=b"<html>")
    store = ArtifactStore(machines("two"))
    assert [one.reference for one in shared_artifacts(store)] == [second.reference]
    (damaged,) = store.damaged()
    assert damaged.reference == first.reference
    assert "login page" in damaged.hint
    with pytest.raises(DamagedError):
        store.get(*first.reference.split("/"))
    store.aliases.set("n", "1", second.reference)
    write_text(machines("two").aliases / "m@1", second.reference)
    assert store.aliases.all() == {"n@1": second.reference}, "an old alias here does not stand in for a damaged one"
    assert store.aliases.damaged() == ["m@1"]
    store.aliases.drop("m@1")
    assert store.aliases.damaged() == []
