"""coverage: each token is counted once per table and stage; low coverage is reported; the page is self-contained."""

from __future__ import annotations

import json
import re
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moray.pipelines.coverage import step as coverage_step
from moray.pipelines.coverage.document_stages import stages_of
from moray.pipelines.coverage.domains import GENERAL, LEXICON, NOT_ENGLISH, domain_of, domains, lexicon
from moray.pipelines.coverage.page import _percent, _short, coverage_page
from moray.pipelines.coverage.step import CoverageConfig
from moray.pipelines.coverage.summary import KINDS, summarize
from moray.pipelines.shared.documents import document_id, shard_name, write_parquet, write_shard
from moray.pipelines.text.language import identify
from moray.platform.core.cluster import Cluster
from moray.platform.core.errors import InputError
from moray.platform.core.home import Home
from moray.platform.plan.recipe import parse_recipe
from moray.platform.run.runner import Runner
from moray.platform.store.artifacts import Artifact, ArtifactStore
from moray.platform.store.search import find_artifact
from tests.step_contexts import context_for, manifest_of

MEDICINE = "The patient had a fever; the physician confirmed the diagnosis and chose a lower dose of insulin therapy. "
LAW = "The court found that the defendant owed damages for breach of contract, and the plaintiff filed an appeal. "
SOFTWARE = "def parse(self, args): return args  # import json, then str and int; async def run(self, **kwargs): await\n"
PLAIN = "We went for a walk along the river in the morning and came home when it began to rain. "
GERMAN = "Am Morgen gingen wir am Fluss spazieren und kamen nach Hause, als es zu regnen begann. "
CHINESE = (
    "\u6211\u4eec\u65e9\u4e0a\u6cbf\u7740\u6cb3\u8fb9\u6563\u6b65\uff0c"
    "\u5f00\u59cb\u4e0b\u96e8\u65f6\u5c31\u56de\u5bb6\u4e86\u3002"
)


def test_languages_are_known_without_a_network() -> None:
    codes, scores = identify([PLAIN, GERMAN, CHINESE, "", " \n "])
    assert codes == ["en", "de", "zh", "", ""]
    assert all(0.5 < score <= 1 for score in scores[:3])
    assert scores[3:] == [0, 0]


@pytest.mark.parametrize(
    ("text", "language", "domain"),
    [
        (MEDICINE, "en", "Medicine"), (LAW, "en", "Law"), (SOFTWARE, "en", "Software"), (PLAIN, "en", GENERAL),
        (GERMAN, "de", NOT_ENGLISH), (SOFTWARE, "de", "Software"), (LAW, "de", NOT_ENGLISH), ("", "", GENERAL),
        (MEDICINE + 2 * LAW, "en", "Law"), (MEDICINE + 60 * PLAIN, "en", GENERAL),
    ],
)  # fmt: skip
def test_a_text_belongs_to_the_domain_with_most_of_its_words(text: str, language: str, domain: str) -> None:
    assert domain_of(text, language) == domain


def test_a_word_of_the_lexicon_is_in_one_domain_and_can_be_met() -> None:
    text = LEXICON.read_text()
    words = [word for block in re.findall(r'"""(.*?)"""', text, re.DOTALL) for word in block.split()]
    assert sorted(words) == sorted(lexicon())
    assert all(re.fullmatch(r"[^\W\d_]+(?:'[^\W\d_]+)?", word) and word == word.lower() for word in words)
    assert {"Medicine", "Law", "Mathematics", "Software"} <= set(domains())


names = st.sampled_from(["a", "b", "en", "Medicine", "Law", GENERAL])
cells = st.lists(st.tuples(names, names, names, st.sampled_from(["", "high"]), st.just(1), st.integers(1, 99)))
stages = st.lists(cells.map(lambda its: [[*cell, cell[5] / 4] for cell in its]), min_size=1, max_size=3)


@given(stages)
def test_each_table_has_every_token_of_each_stage_once(its: list[Any]) -> None:
    report = summarize([f"s{i}" for i in range(len(its))], its, [[]] * len(its), 0.2)
    for number, stage in enumerate(report["stages"]):
        for kind in KINDS:
            rows = report[kind]
            assert kind == "quality" or len(rows) > 0 or not any(its)
            if rows:
                documents = sum(row["documents"][number] for row in rows)
                assert documents == stage["documents"]
                assert abs(sum(row["tokens"][number] for row in rows) - stage["tokens"]) <= len(rows), "each is rounded"
    shown = coverage_page({"title": "t", "tokens": "estimated", **report})
    assert not re.search(r"\bnan\b", shown)


def test_domains_below_a_fraction_of_an_even_share_have_low_coverage() -> None:
    kinds = [[["s", "en", name, "", 10, 4000, 1000.0] for name in domains()]]
    report = summarize(["corpus"], kinds, [[]], 0.2)
    assert (report["thin"], report["even_share"]) == ([], 1000)
    kinds[0][0][6] = 170.0
    report = summarize(["corpus"], kinds, [[]], 0.2)
    assert [one["domain"] for one in report["thin"]] == [domains()[0]]
    assert report["thin"][0]["of_even_share"] == pytest.approx(
        170 / ((170 + 1000 * (len(domains()) - 1)) / len(domains()))
    )
    del kinds[0][0]
    assert summarize(["corpus"], kinds, [[]], 0.2)["thin"][0] == {
        "domain": domains()[0],
        "tokens": 0,
        "of_even_share": 0,
    }


def commit(
    home: Home, step: str, shards: list[list[dict[str, Any]]], parent: Artifact | None, removed: Any
) -> Artifact:
    """A documents artifact as a step would leave it."""
    store, fingerprint = ArtifactStore(home), f"{step}-f"
    folder = store.prepare(step, fingerprint, keep_leftovers=False)
    for number, rows in enumerate(shards):
        table = pa.table(
            {
                "id": pa.array([row["id"] for row in rows], pa.string()),
                "text": pa.array([row["text"] for row in rows], pa.large_string()),
                "source": pa.array([row["source"] for row in rows], pa.string()),
                "license": pa.array([""] * len(rows), pa.string()),
                "meta": pa.array([[]] * len(rows), pa.map_(pa.string(), pa.string())),
            }
        )
        for name in ("language", "quality_band"):
            if rows and name in rows[0]:
                table = table.append_column(name, pa.array([row[name] for row in rows], pa.string()))
        write_shard(folder / shard_name(number), table)
    for name, rows in (removed or {}).items():
        columns = {key: pa.array([row[key] for row in rows], pa.string()) for key in ("id", "reason")}
        write_parquet(folder / name, pa.table(columns))
    manifest = manifest_of(
        step,
        fingerprint,
        inputs={"documents": parent.reference} if parent else {},
        counts={} if parent else {"dropped:empty": 3},
    )
    return store.commit(manifest)


def row(key: str, text: str, source: str = "web", **more: str) -> dict[str, Any]:
    return {"id": document_id(source, key), "text": text, "source": source, **more}


def three_stages(home: Home) -> Artifact:
    """A corpus, a filter that names languages and bands and changes a text, and a dedup; over two shards."""
    first = [row("m", 4 * MEDICINE), row("p", 8 * PLAIN), row("c", SOFTWARE, "code")]
    second = [row("l", 4 * LAW), row("l2", 4 * LAW + "x"), row("g", 4 * GERMAN), row("short", "no")]
    corpus = commit(home, "corpus", [first, second], None, {})
    kept = [[{**one, "language": "en", "quality_band": "high"} for one in first], second[:3]]
    kept[0][1]["text"] = kept[0][1]["text"][: len(8 * PLAIN) // 2]
    kept[1] = [
        {**one, "language": "de" if one["text"].startswith("Am") else "en", "quality_band": "low"} for one in kept[1]
    ]
    gone = {"removed-00001.parquet": [{"id": second[3]["id"], "reason": "too_short"}]}
    filtered = commit(home, "filter", kept, corpus, gone)
    last = {"removed.parquet": [{"id": second[1]["id"], "reason": "near"}]}
    return commit(home, "dedup", [kept[0], [kept[1][0], kept[1][2]]], filtered, last)


def run_step(home: Home, artifact: Artifact, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The step, its tasks one after another in this process; its report."""

    def map_shards(ctx: Any, phase: str, rows: Any, function: Any, unit: str, amount: Any) -> Any:
        return [function(row) for row in rows]

    monkeypatch.setattr(coverage_step, "map_shards", map_shards)
    context = context_for("coverage", CoverageConfig(), {"documents": artifact}, folder, home, folder / "run")
    coverage_step.step.run(context)
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def test_stages_and_tables_are_counted_from_the_last_artifact_alone(
    tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = run_step(home, three_stages(home), tmp_path / "out", monkeypatch)
    assert [stage["stage"] for stage in report["stages"]] == ["corpus", "filter", "dedup"]
    assert [stage["documents"] for stage in report["stages"]] == [7, 6, 5]
    by = {kind: {one["name"]: one for one in report[kind]} for kind in KINDS}
    size = len((4 * MEDICINE).encode()) / 4
    assert by["domain"]["Medicine"]["tokens"] == [round(size)] * 3
    assert by["domain"]["Law"]["documents"] == [2, 2, 1]
    plain = by["domain"][GENERAL]["tokens"]
    assert plain[1] == plain[2] == round(len(8 * PLAIN) / 8)
    assert by["language"]["de"]["documents"] == [1, 1, 1]
    assert by["source"]["code"]["documents"] == [1, 1, 1]
    assert by["quality"]["not rated"]["documents"][0] == 7
    assert by["quality"]["high"]["documents"][1:] == [3, 3]
    assert [[one["reason"] for one in stage["dropped"]] for stage in report["stages"]] == [
        ["empty"],
        ["too_short"],
        ["near"],
    ]
    assert report["stages"][2]["dropped"][0]["tokens"] == round(len((4 * LAW + "x").encode()) / 4)
    assert {one["domain"] for one in report["thin"]} >= {"Religion", "Sport"}
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
    closing = (tmp_path / "out" / "closing.txt").read_text()
    assert closing == "coverage: file://${artifact}/report.html\n"  # no path of the host that made it


def test_a_removed_stage_is_an_error(home: Home) -> None:
    last, store = three_stages(home), ArtifactStore(home)
    find = partial(find_artifact, store)
    assert [stage.label for stage in stages_of(last, store, find)] == ["corpus", "filter", "dedup"]
    (store.folder("filter", "filter-f") / "manifest.json").unlink()
    with pytest.raises(InputError, match="filter/filter-f, an input of dedup/dedup-f, has been removed"):
        stages_of(last, store, find)


class _Page(HTMLParser):
    """Collects open tags, URLs that a browser would fetch, and labels of pictures."""

    VOID = ("meta", "link", "br", "img", "hr")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.pictures: list[str | None] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.addresses += [value for name in ("src", "href") if (value := given.get(name))]
        if given.get("role") == "img":
            self.pictures.append(given.get("aria-label"))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_one_file_that_fetches_nothing_and_escapes_names(
    tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = run_step(home, three_stages(home), tmp_path / "out", monkeypatch)
    report["source"][0]["name"] = "<script>alert(1)</script>"
    text = coverage_page(report)
    parsed = _Page()
    parsed.feed(text)
    assert parsed.open == []
    assert parsed.addresses == ["data:,"], "an empty icon, so that no browser asks for one"
    assert "url(" not in text
    assert "<script" not in text
    assert parsed.pictures
    assert all(parsed.pictures), "every chart has a label for screen readers"
    assert len(text) < 300_000


def test_numbers_are_short() -> None:
    assert [_short(n) for n in (0, 999, 1000, 1234567, 999_999, 2e9)] == ["0", "999", "1 k", "1.23 M", "1000 k", "2 B"]
    assert [_percent(s) for s in (0, 0.0001, 0.012, 0.17, 1)] == ["0 %", "<0.1 %", "1.2 %", "17 %", "100 %"]


def test_a_run_reports_its_own_stages(tmp_path: Path, home: Home, ray_cluster: Cluster) -> None:
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"Note {number}. " + 3 * (MEDICINE, LAW, PLAIN)[number % 3])
    recipe = f"""
name: covered
steps:
  corpus: {{with: {{shard_bytes: 4000, sources: [{{name: notes, path: "{tmp_path}", include: ["*.txt"]}}]}}}}
  dedup: {{inputs: {{documents: corpus}}}}
  coverage: {{inputs: {{documents: dedup}}}}
"""
    result = Runner(home, ray_cluster).run(parse_recipe(recipe, tmp_path / "covered.yaml"))
    artifact = result.steps["coverage"].artifact
    report = json.loads((artifact.folder / "report.json").read_text())
    assert [stage["stage"] for stage in report["stages"]] == ["corpus", "dedup"]
    assert report["stages"][0]["documents"] == 30
    kept = result.steps["dedup"].artifact.manifest.counts["out:documents"]
    assert artifact.manifest.counts["documents"] == kept == report["stages"][1]["documents"]
    assert (artifact.folder / "report.html").read_text().startswith("<!doctype html>")
