"""Packing: no token is lost, few documents are split, best fit follows its definition, sequences are full."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moray.pipelines.tokenize.best_fit import best_fit
from moray.pipelines.tokenize.sequence_packing import Packing, PlacedPieces, plan_sequences

LENGTH = 64
lengths = st.lists(st.integers(2, 300), min_size=1, max_size=60).map(lambda found: np.array(found, np.int64))


def unused(pieces: PlacedPieces, length: int) -> np.ndarray:
    """Unused tokens of each sequence. Also checks that no position is used twice."""
    taken = np.zeros(pieces.sequences * length, np.int64)
    for start, tokens in zip(pieces.start, pieces.tokens, strict=True):
        taken[start : start + tokens] += 1
    assert taken.max(initial=0) <= 1
    return length - taken.reshape(-1, length).sum(axis=1)


@pytest.mark.parametrize("packing", ["best-fit", "concatenate"])
@given(found=lengths)
def test_every_token_has_one_place(packing: Packing, found: np.ndarray) -> None:
    pieces = plan_sequences(found, LENGTH, packing)
    left = unused(pieces, LENGTH)
    assert pieces.tokens.sum() == found.sum()
    for document, tokens in enumerate(found):
        own = sorted(np.flatnonzero(pieces.document == document), key=lambda n: int(pieces.begin[n]))
        ends = np.cumsum(pieces.tokens[own])
        assert pieces.begin[own].tolist() == [0, *ends[:-1]], "pieces follow one another"
        assert ends[-1] == tokens
    assert (np.diff(pieces.start) > 0).all()
    last = pieces.begin + pieces.tokens == found[pieces.document]
    assert (last | ((pieces.start + pieces.tokens) % LENGTH == 0)).all(), "ends with its document or with its sequence"
    assert left.sum() < LENGTH or packing == "best-fit"


def definition(pieces: list[int], length: int) -> list[list[int]]:
    """Best fit by its definition: each piece into the fullest sequence that can hold it, the newest of these."""
    sequences: list[list[int]] = []
    for piece in pieces:
        fits = [n for n, own in enumerate(sequences) if sum(own) + piece <= length]
        if fits:
            sequences[max(fits, key=lambda n: (sum(sequences[n]), 0))].append(piece)
        else:
            sequences.append([piece])
    return sequences


@given(st.lists(st.integers(1, LENGTH), max_size=80))
def test_best_fit_follows_its_definition(found: list[int]) -> None:
    """Compares fill only, because either of two equally full sequences may be chosen."""
    pieces = np.array(sorted(found, reverse=True), np.int64)
    sequence, at = np.empty_like(pieces), np.empty_like(pieces)
    left = best_fit(pieces, np.arange(len(pieces)), LENGTH, sequence, at)
    expected = definition(pieces.tolist(), LENGTH)
    assert sorted(left.tolist()) == sorted(LENGTH - sum(own) for own in expected)
    assert (at + pieces <= LENGTH).all()


@given(lengths)
def test_a_document_that_fits_is_cut_only_to_fill_unused_space(found: np.ndarray) -> None:
    pieces = plan_sequences(found, LENGTH, "best-fit")
    cut = pieces.cut(LENGTH)
    assert cut >= (found > LENGTH).sum()
    tokens = np.where(found > LENGTH, found % LENGTH, found)
    tokens = tokens[(tokens > 0) & (found % LENGTH > 0)]
    sequence, at = np.empty_like(tokens), np.empty_like(tokens)
    left = best_fit(tokens, np.argsort(-tokens, kind="stable"), LENGTH, sequence, at)
    if left.sum() < LENGTH:
        assert cut == (found > LENGTH).sum()


@pytest.mark.parametrize("tokens", [33, 40, 63, 65, 100])
def test_sequences_are_full_for_any_lengths(tokens: int) -> None:
    """Best fit alone leaves up to half of every sequence empty here."""
    found = np.full(3000, tokens, np.int64)
    pieces = plan_sequences(found, LENGTH, "best-fit")
    left = unused(pieces, LENGTH)
    if tokens == 63:
        assert (left == 1).all(), "a hole that is not worth a cut"
        assert pieces.cut(LENGTH) == 0
    else:
        assert pieces.sequences <= -(-int(found.sum()) // LENGTH) + 2, "the last ones may have nobody to share with"
    back_to_back = plan_sequences(found, LENGTH, "concatenate")
    assert pieces.cut(LENGTH) <= back_to_back.cut(LENGTH)


def test_documents_cut_are_counted() -> None:
    pieces = plan_sequences(np.array([60, 10, 64, 130], np.int64), LENGTH, "concatenate")
    assert pieces.cut(LENGTH) == 3, "the second, the third and the last cross a border"
    assert plan_sequences(np.array([60, 4, 64, 130], np.int64), LENGTH, "best-fit").cut(LENGTH) == 1


def test_real_lengths_fill_sequences_and_cut_few() -> None:
    """Lengths as texts have them: log-normal."""
    found = np.random.default_rng(1).lognormal(5.5, 1.2, 50_000).astype(np.int64) + 2
    ours, theirs = (plan_sequences(found, 2048, packing) for packing in ("best-fit", "concatenate"))
    assert found.sum() / (ours.sequences * 2048) >= 0.999
    assert ours.cut(2048) <= theirs.cut(2048) / 3
    again = plan_sequences(found, 2048, "best-fit")
    assert all(np.array_equal(getattr(ours, name), getattr(again, name)) for name in ("document", "begin", "start"))
