"""`moray explain` for kept, removed and unknown documents."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moray.pipelines.shared.document_history import explain_document_in
from moray.pipelines.shared.documents import document_id, read_shard
from moray.platform.cli.main import main
from moray.platform.core.errors import InputError
from moray.platform.run.console import visible
from moray.platform.run.history import RunRow, StepRow
from tests.conftest import Flow
from tests.pipelines.dedup.oracle import Text
from tests.pipelines.dedup.runs import CLOSE, DedupRun

WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture
def dedup_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DedupRun:
    texts = [
        Text(document_id("best", "first"), " ".join(WORDS), "best"),
        Text(document_id("s", "second"), " ".join([*WORDS[:-1], "other"]), "s"),
        Text(document_id("s", "third"), "nothing like them at all, or is it", "s"),
    ]
    made = DedupRun(tmp_path, texts, 2, CLOSE)
    made.run(monkeypatch)
    return made


def runs(dedup_run: DedupRun) -> list[RunRow]:
    steps = {"filter": dedup_run.documents, "dedup": dedup_run.artifact}
    known = {key: StepRow(key, fingerprint=artifact.fingerprint) for key, artifact in steps.items()}
    return [RunRow("later", steps={}), RunRow("run", steps=known)]


def test_a_removed_document_names_its_representative_and_the_similarity(dedup_run: DedupRun) -> None:
    found = explain_document_in(dedup_run.store, runs(dedup_run), "s/second")
    assert (found.id, found.run) == (document_id("s", "second"), "run")
    assert found.document["source"] == "s"
    assert found.document["begins"].startswith("w0 w1 w2")
    removed = [one for one in found.decisions if one.verdict == "removed"]
    assert removed[0].step == "dedup"
    assert removed[0].file == "removed-00001.parquet"
    first = document_id("best", "first")
    assert removed[0].details == {
        "reason": "near",
        "representative": first,
        "partner": first,
        "similarity": pytest.approx(55 / 57),
    }
    assert found.others[first]["source"] == "best"


def test_a_kept_document_was_read_and_kept(dedup_run: DedupRun) -> None:
    found = explain_document_in(dedup_run.store, runs(dedup_run), document_id("s", "third"))
    assert [one.verdict for one in found.decisions] == ["read", "kept"]
    assert not found.others


def moray(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return int(str(caught.value.code))


def test_an_unknown_document_is_an_error(dedup_run: DedupRun) -> None:
    with pytest.raises(InputError, match="no document 's/fourth' in 1 runs") as caught:
        explain_document_in(dedup_run.store, runs(dedup_run), "s/fourth")
    assert "SOURCE/KEY" in caught.value.hint


@given(st.text())
def test_shown_text_moves_no_cursor(text: str) -> None:
    """Escape sequences in ids, addresses and texts are spelled out; all else is as it was."""
    shown = visible(f"\x1b[31m{text}\x9b2J\u202e")
    assert shown.startswith("\\x1b[31m")
    assert shown.endswith("\\x9b2J\\u202e")
    assert not any(unicodedata.category(one) == "Cc" for one in shown)
    assert visible("two\nlines", "\n") == "two\nlines"


def test_every_step_of_a_run_is_asked(
    flow: Flow, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MORAY_HOME", str(flow.home.root))
    rows = [row for path in flow.artifact("dedup").folder.glob("removed-*") for row in read_shard(path).to_pylist()]
    gone = next(row for row in rows if row["reason"] == "exact")
    assert moray("explain", gone["id"], "--json") == 0
    found = json.loads(capsys.readouterr().out)
    verdicts = {one["step"]: one["verdict"] for one in found["decisions"]}
    assert verdicts == {"corpus": "read", "filter": "kept", "dedup": "removed"}
    assert moray("explain", gone["representative"], "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {one["step"]: one["verdict"] for one in found["decisions"]}["tokenize"] == "has"
    assert moray("explain", gone["id"]) == 0
    assert "removed: exact" in capsys.readouterr().out
