"""dedup-urls: equality of URLs, and the kept documents, which do not depend on the order or the shards."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moray.pipelines.dedup import urls
from moray.pipelines.dedup.urls import DedupUrlsConfig, canonical_url
from moray.pipelines.shared.documents import content_hash
from moray.platform.core.errors import InputError
from tests.pipelines.step_runs import Interrupted, Page, run_in_process


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("HTTP://Example.COM:80/a?b=2&a=1#part", "http://example.com/a?a=1&b=2"),
        ("https://example.com", "https://example.com:443/"),
        ("https://example.com/%7Ejane/\u00fc", " https://example.com/~jane/%C3%BC\n"),
        ("https://example.com/?utm_source=mail&id=7&fbclid=x", "https://example.com/?id=7"),
        ("https://example.com/a?q=x%20y", "https://example.com/a?q=x+y"),
    ],
)
def test_equal_urls(one: str, other: str) -> None:
    assert canonical_url(one) == canonical_url(other) != ""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("http://example.com/", "https://example.com/"),
        ("https://example.com/a", "https://example.com/a/"),
        ("https://example.com/A", "https://example.com/a"),
        ("https://example.com:8080/", "https://example.com/"),
        ("https://example.com/?tag=1&tag=2", "https://example.com/?tag=1"),
        ("https://example.com/?cid=5", "https://example.com/?cid=6"),
        ("https://example.com/?q=", "https://example.com/"),
        ("https://www.example.com/", "https://example.com/"),
    ],
)
def test_different_urls(one: str, other: str) -> None:
    assert canonical_url(one) != canonical_url(other)


@pytest.mark.parametrize("url", ["", "not a url", "http://[::1", "mailto:a@b.c", "/local/path", "https://:80/"])
def test_unreadable_urls(url: str) -> None:
    assert canonical_url(url) == ""


@given(st.text(max_size=40), st.sampled_from(["", "http://", "https://a.b/", "https://a.b:443/?x="]))
def test_canonical_form_is_its_own(rest: str, begin: str) -> None:
    canonical = canonical_url(begin + rest)
    assert canonical_url(canonical) == canonical


def pages(generator: random.Random) -> list[Page]:
    made = []
    for number in range(60):
        meta = {"url": f"https://a.b/{generator.randrange(12)}?utm_source={number}"} if number % 5 else {}
        if number % 7 == 0:
            meta["url"] = "nowhere"
        if number % 3:
            meta["date"] = f"2024-03-{generator.randrange(1, 28):02d}T00:00:00Z"
        text = "word " * generator.randrange(1, 9)
        made.append(Page(text, str(number), generator.choice(["best", "s"]), meta))
    return made


@pytest.mark.parametrize("newest", ["", "date"])
def test_one_document_per_url_is_kept_for_any_shards(
    newest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DedupUrlsConfig(prefer=("best",), newest=newest)
    generator = random.Random(3)
    documents = pages(generator)
    stays: dict[str, Page] = {}
    # By the definition: the last of the sorts decides first.
    documents.sort(key=lambda page: (-len(page.text), content_hash(page.text), page.id))
    if newest:
        documents.sort(key=lambda page: page.meta.get("date", ""), reverse=True)
    documents.sort(key=lambda page: page.source != "best")
    gone = {}
    for page in documents:
        url = page.meta.get("url", "").partition("?")[0]
        if url.startswith("http") and stays.setdefault(url, page) is not page:
            gone[page.id] = stays[url].id
    assert len(gone) > 20
    results = []
    for shards in (1, 3, 7):
        generator.shuffle(documents)
        done = run_in_process(urls, config, tmp_path / str(shards), documents, shards, monkeypatch)
        assert {row["id"]: row["representative"] for row in done.rows("removed")} == gone
        assert set(done.kept()) == {page.id for page in documents} - set(gone)
        assert done.counts["unreadable:url"] == 9
        assert done.counts["without:url"] == sum("url" not in page.meta for page in documents)
        assert done.counts["dropped:url"] == len(gone)
        results.append(done.tables["removed.parquet"])
    assert results[0].equals(results[1])
    assert results[0].equals(results[2])


def test_dates_of_several_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dates = [
        "",
        "yesterday",
        "Tue, 15 Nov 1994 08:12:31 GMT",
        "1994-11-15T08:12:32Z",
        "1994-11-15",
        "1994-11-15T10:12:31+02:00",
    ]
    documents = [Page(f"{n}", str(n), meta={"url": "https://a.b/", "when": date}) for n, date in enumerate(dates)]
    done = run_in_process(urls, DedupUrlsConfig(newest="when"), tmp_path, documents, 2, monkeypatch)
    assert list(done.kept().values()) == ["3"]


@pytest.mark.parametrize("stop_after", [1, 3, 4, 5])
def test_an_interrupted_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int) -> None:
    documents = pages(random.Random(4))
    whole = run_in_process(urls, DedupUrlsConfig(), tmp_path / "whole", documents, 3, monkeypatch)
    with pytest.raises(Interrupted):
        run_in_process(urls, DedupUrlsConfig(), tmp_path / "it", documents, 3, monkeypatch, stop_after)
    assert run_in_process(urls, DedupUrlsConfig(), tmp_path / "it", documents, 3, monkeypatch) == whole


@given(
    st.sampled_from(["{}", "1 Jan {} 00:00:00 GMT", "Mon, 01 Jan 2024 00:00:00 {}", "{}-01-01T00:00:00", "2024-{}-01"]),
    st.one_of(st.text(max_size=12), st.integers().map(str), st.integers(-(10**20), 10**20).map("{:+d}".format)),
)
def test_an_unrepresentable_date_is_none(form: str, odd: str) -> None:
    found = urls._seconds(form.format(odd))
    assert found is None or isinstance(found, float)


def test_absurd_dates_end_nothing() -> None:
    for date in (None, "", "1 Jan 20260101120000 00:00:00 GMT", "Mon, 01 Jan 2024 00:00:00 +99999999999999"):
        assert urls._seconds(date) is None


@pytest.mark.parametrize(
    ("fields", "message"), [({"key": "addres"}, "key: no document has 'addres'"), ({"newest": "dat"}, "newest: no doc")]
)
def test_a_field_that_no_document_has_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, str], message: str
) -> None:
    meta = {"address": "http://a.b/1", "date": "2024-01-01"}
    made = [Page(f"words {i}", f"d{i}", meta=meta) for i in range(3)]
    with pytest.raises(InputError, match=message) as found:
        run_in_process(urls, DedupUrlsConfig.model_validate(fields), tmp_path, made, 2, monkeypatch)
    assert found.value.hint == f"did you mean {'address' if 'key' in fields else 'date'!r}?"
