"""dedup against an index of earlier runs: it removes the documents that one run over all inputs would remove."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from moray.pipelines.dedup import bloom, dedup_index, graph
from moray.pipelines.dedup import step as dedup_step
from moray.pipelines.dedup.config import DedupConfig
from moray.pipelines.dedup.dedup_index import Earlier, Generation
from moray.pipelines.shared.documents import document_id
from moray.platform.core.errors import RecipeError
from tests.pipelines.dedup.oracle import Text
from tests.pipelines.dedup.runs import DedupRun, kept, removed
from tests.pipelines.step_runs import Interrupted
from tests.step_contexts import manifest_of

CONFIG = DedupConfig(bands=8, rows=1, shingle=2, similarity=0.6, prefer=("best",), index="crawl")


def drawn(generator: random.Random, runs: int, each: int) -> list[list[Text]]:
    """Families of shifted copies of a text: chains that later runs extend and bridge."""
    made, number = [], 0
    for _ in range(runs):
        texts = []
        for _ in range(generator.randrange(1, each)):
            base, shift = generator.randrange(5), generator.randrange(9)
            words = [f"b{base}w{i + 3 * shift}" for i in range(24)]
            source = generator.choice(["best", "s"])
            texts.append(Text(document_id("n", str(number)), " ".join(words) if base else "...", source))
            number += 1
        made.append(texts)
    return made


def removed_from_scratch(folder: Path, runs: list[list[Text]], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The documents that one run over all texts removes. Sources per run and preference give older ones priority."""
    texts, prefer = [], []
    for number, dedup_run in enumerate(runs):
        prefer += [f"{number}-best", f"{number}-s"]
        texts += [Text(one.id, one.text, f"{number}-{one.source}") for one in dedup_run]
    config = CONFIG.model_copy(update={"index": "", "prefer": tuple(prefer)})
    rows = removed(DedupRun(folder, texts, 2, config).run(monkeypatch)).to_pylist()
    return {row["id"]: row["representative"] for row in rows}


@pytest.mark.parametrize("seed", range(6))
def test_a_chain_of_runs_removes_the_same_as_one_run_over_all_texts(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "LARGEST", 3)  # so that large buckets are among the cases
    generator = random.Random(seed)
    runs = drawn(generator, 3, 14)
    dedup_run, gone, known_gone = None, {}, set()
    for number, texts in enumerate(runs):
        monkeypatch.setattr(dedup_index, "_RANGE_ENTRIES", generator.choice([3, 1000]))
        dedup_run = DedupRun(tmp_path, texts, generator.randrange(1, 4), CONFIG, dedup_run)
        tables = dedup_run.run(monkeypatch)
        gone |= {row["id"]: row["representative"] for row in removed(tables).to_pylist()}
        gone |= {row["id"]: row["representative"] for row in tables["superseded.parquet"].to_pylist()}
        scratch = removed_from_scratch(tmp_path / f"{number}", runs[: number + 1], monkeypatch)
        assert gone.keys() == scratch.keys()
        assert known_gone <= gone.keys()
        known_gone = set(gone)
        own = {one.id for one in texts}
        assert set(kept(tables)) == own - scratch.keys()
        assert {one: scratch[one] for one in own & scratch.keys()} == {one: gone[one] for one in own & gone.keys()}


def test_an_interrupted_run_with_an_index_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = drawn(random.Random(3), 2, 30)
    for stop_after in (0, 2, 9, 12, 14, 15):
        whole, torn = tmp_path / f"whole-{stop_after}", tmp_path / f"torn-{stop_after}"
        first = {folder: DedupRun(folder, runs[0], 2, CONFIG) for folder in (whole, torn)}
        for dedup_run in first.values():
            dedup_run.run(monkeypatch)
        second = {folder: DedupRun(folder, runs[1], 3, CONFIG, first[folder]) for folder in (whole, torn)}
        with pytest.raises(Interrupted):
            second[torn].run(monkeypatch, stop_after)
        assert second[torn].run(monkeypatch) == second[whole].run(monkeypatch)


def parts_of(hashes: np.ndarray, ranges: int) -> np.ndarray:
    high, _ = dedup_index.halves(hashes)
    return high >> (64 - ranges.bit_length() + 1) if ranges > 1 else high * 0


@pytest.mark.parametrize("ranges", [1, 4, 64])
def test_an_index_finds_the_written_entries(ranges: int, tmp_path: Path) -> None:
    generator = np.random.default_rng(ranges)
    keys = generator.integers(0, 1 << dedup_index.KEY_BITS, 300, dtype=np.uint64)
    keys[200:] = keys[:100]  # keys of two
    keys[7] = (1 << dedup_index.KEY_BITS) - 1
    hashes = np.array([generator.bytes(16).hex() for _ in range(300)], "S32")
    hashes[5], hashes[6] = b"f" * 32, b"f" * 23 + b"0" * 9  # equal in the first 92 bits
    for part in range(ranges):
        of_keys, of_hashes = (keys * ranges) >> dedup_index.KEY_BITS == part, parts_of(hashes, ranges) == part
        dedup_index.write_band(tmp_path, 3, part, keys[of_keys], np.flatnonzero(of_keys))
        dedup_index.write_hashes(tmp_path, part, hashes[of_hashes], np.flatnonzero(of_hashes))
    earlier = [Earlier(Generation("a/b", 0, (), (300,), ranges), tmp_path, tmp_path)]
    wanted = np.concatenate((keys[3:9], np.array([0, 5], np.uint64)))
    found_keys, numbers = dedup_index.find_earlier_keys(earlier, 3, wanted)
    expected = sorted((int(keys[n]), n) for n in range(300) if keys[n] in wanted)
    assert list(zip(found_keys.tolist(), numbers.tolist(), strict=True)) == expected
    unknown = np.array([b"0" * 32, b"f" * 22 + b"1" * 10], "S32")
    found = dedup_index.find_hashes(earlier, np.concatenate((hashes[:20][::-1], unknown)))
    assert found.tolist() == [*range(19, -1, -1), -1, -1]


def test_an_index_takes_120_bytes_a_document(tmp_path: Path) -> None:
    count, generator = 20_000, np.random.default_rng(1)
    ranges = dedup_index.index_ranges(count)
    for band in range(16):
        dedup_index.write_band(
            tmp_path, band, ranges, generator.integers(0, 1 << dedup_index.KEY_BITS, count, np.uint64), np.arange(count)
        )
    dedup_index.write_hashes(
        tmp_path, 0, np.array([generator.bytes(16).hex() for _ in range(count)], "S32"), np.arange(count)
    )
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.parquet")) <= 120 * count


def test_ranges_hold_a_few_million_documents_each() -> None:
    assert [dedup_index.index_ranges(n) for n in (0, 1, 4_000_000, 4_000_001, 10**10)] == [1, 1, 1, 2, 4096]
    assert all(
        one == other or 2 * one == other
        for one, other in pairwise(map(dedup_index.index_ranges, range(1, 10**8, 10**6)))
    )


def test_a_band_writes_its_part_of_the_index_once(tmp_path: Path) -> None:
    """Files are written atomically: a rerun after a kill writes the same bytes."""
    keys = np.arange(50, dtype=np.uint64)[::-1].copy()
    dedup_index.write_band(tmp_path, 0, 0, keys, np.arange(50))
    before = {path.name: path.read_bytes() for path in (tmp_path / "index" / "band-00").iterdir()}
    dedup_index.write_band(tmp_path, 0, 0, keys, np.arange(50))
    assert {path.name: path.read_bytes() for path in (tmp_path / "index" / "band-00").iterdir()} == before


def test_a_bloom_filter_removes_all_seen_documents_and_few_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It removes documents that share a key with an earlier one, and documents similar to these."""
    config = CONFIG.model_copy(update={"index_form": "bloom", "similarity": 0.0})
    generator = random.Random(11)
    runs = drawn(generator, 3, 25)
    dedup_run, gone = None, set()
    for number, texts in enumerate(runs):
        monkeypatch.setattr(dedup_index, "_RANGE_ENTRIES", (5, 1000, 2)[number])
        dedup_run = DedupRun(tmp_path, texts, 2, config, dedup_run)
        tables = dedup_run.run(monkeypatch)
        gone |= set(removed(tables)["id"].to_pylist())
        scratch = DedupRun(tmp_path / f"{number}", ordered(runs[: number + 1]), 2, unverified(number + 1))
        own = {one.id for one in texts}
        assert gone & own == set(removed(scratch.run(monkeypatch))["id"].to_pylist()) & own
        assert set(kept(tables)) == {one.id for one in texts} - gone
    seen = [row for row in removed(tables).to_pylist() if row["reason"] == "seen"]
    assert seen
    assert {(row["representative"], row["partner"], row["similarity"]) for row in seen} == {("", "", None)}


def ordered(runs: list[list[Text]]) -> list[Text]:
    return [Text(one.id, one.text, f"{i}-{one.source}") for i, dedup_run in enumerate(runs) for one in dedup_run]


def unverified(runs: int) -> DedupConfig:
    prefer = tuple(f"{i}-{source}" for i in range(runs) for source in ("best", "s"))
    return CONFIG.model_copy(update={"index": "", "similarity": 0.0, "prefer": prefer})


def test_a_bloom_filter_takes_55_bytes_per_document_and_errs_six_times_in_a_million(tmp_path: Path) -> None:
    count, generator = 100_000, np.random.default_rng(5)
    keys = generator.integers(0, 1 << dedup_index.KEY_BITS, (17, count), np.uint64)
    for band in range(17):
        bloom.write_bloom(tmp_path, f"{band}", 0, keys[band])
    assert sum(path.stat().st_size for path in (tmp_path / "index").iterdir()) <= 55 * count
    earlier = [Earlier(Generation("a/b", 0, (), (count,), 1), tmp_path, tmp_path)]
    assert bloom.seen(earlier, "3", keys[3], dedup_index.KEY_BITS).all()
    unseen = generator.integers(0, 1 << dedup_index.KEY_BITS, 2_000_000, np.uint64)
    assert bloom.seen(earlier, "3", unseen, dedup_index.KEY_BITS).sum() <= 30, "12 are expected"


@pytest.mark.parametrize(
    ("version", "changed", "said"),
    [
        (dedup_step.step.version - 1, {}, "was made by version"),
        (dedup_step.step.version, {"seed": 9}, "other settings: seed"),
    ],
)
def test_an_index_that_would_find_nothing_is_refused(version: int, changed: dict[str, int], said: str) -> None:
    """With another hash or seed, band keys differ, so no copy would be found."""
    earlier = manifest_of("dedup", "f", step_version=version, config={**CONFIG.model_dump(mode="json"), **changed})
    with pytest.raises(RecipeError, match=said):
        dedup_step.step.follow(CONFIG, earlier)
