"""Rows arrive in inboxes as if packed, permuted and sent one after another, with every implementation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.kernels.push import push_rows, push_rows_reference, push_rows_triton
from moray.kernels.rows_cpu import compiles, pack_rows_compiled, push_rows_compiled
from moray.kernels.wire import pack_rows, pack_rows_reference, packed_width, unpack_rows
from tests.examples import examples
from tests.kernels.compare import same_bits

UNTOUCHED = 0xAB
SPECIMENS = {
    "push": lambda: push_rows_triton(
        torch.zeros(64, 512, dtype=torch.bfloat16), torch.zeros(64, 36, dtype=torch.uint8),
        torch.ones(4, 64, dtype=torch.bool), [torch.zeros(64, packed_width(512) + 36, dtype=torch.uint8)] * 4,
    )
}  # fmt: skip


def _drawn(tokens, columns, ranks, tail, dtype, extreme, seed):
    """Rows of many magnitudes, their tails, and where they go: some nowhere, some to all."""
    generator = torch.Generator().manual_seed(seed)
    rows_TD = torch.randn(tokens, columns, generator=generator)
    rows_TD = (rows_TD * 10 ** (20 * (torch.rand(tokens, columns, generator=generator) - 0.5))).to(dtype)
    if extreme is not None:
        rows_TD[::2, ::3] = extreme
    metadata_TN = torch.randint(0, 256, (tokens, tail), dtype=torch.uint8, generator=generator)
    return rows_TD, metadata_TN, torch.rand(ranks, tokens, generator=generator) < 0.6


def _pushed(implementation, rows_TD, metadata_TN, sent_PT):
    width = packed_width(rows_TD.shape[1]) + metadata_TN.shape[1]
    inboxes = [torch.full((len(rows_TD) + 1, width), UNTOUCHED, dtype=torch.uint8) for _ in sent_PT]
    implementation(rows_TD, metadata_TN, sent_PT, inboxes)
    return inboxes


@pytest.mark.parametrize("implementation", [push_rows, push_rows_reference, push_rows_triton, push_rows_compiled])
@settings(max_examples=examples(25), deadline=None)
@given(
    tokens=st.sampled_from([0, 1, 9]),
    columns=st.sampled_from([1, 24, 128, 129, 300]),
    ranks=st.integers(1, 3),
    tail=st.sampled_from([0, 1, 5, 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    extreme=st.sampled_from([None, 0.0, 448.0, 1e-30, 1e-42, float("inf"), float("nan")]),
    seed=st.integers(0, 2**31),
)
def test_each_inbox_holds_its_rows_in_order(implementation, tokens, columns, ranks, tail, dtype, extreme, seed):
    rows_TD, metadata_TN, sent_PT = _drawn(tokens, columns, ranks, tail, dtype, extreme, seed)
    packed, width = pack_rows_reference(rows_TD), packed_width(columns)
    for inbox, sent_T in zip(_pushed(implementation, rows_TD, metadata_TN, sent_PT), sent_PT, strict=True):
        source_C = sent_T.nonzero().squeeze(1)
        found, rest = inbox[: len(source_C)], inbox[len(source_C) :]
        same_bits(*(unpack_rows(one, columns, dtype).dequantized() for one in (found[:, :width], packed[source_C])))
        assert torch.equal(found[:, width:], metadata_TN[source_C])
        assert (rest == UNTOUCHED).all(), "it wrote past what it sends"
        finite = packed[source_C][:, columns:].ne(255).all(1)
        assert torch.equal(found[finite, :width], packed[source_C][finite])


@settings(max_examples=examples(60), deadline=None)
@given(
    columns=st.sampled_from([1, 24, 128, 129, 300]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    extreme=st.sampled_from([None, 0.0, 448.0, 1e-30, 1e-42, float("inf"), float("nan")]),
    seed=st.integers(0, 2**31),
)
def test_compiled_packing_gives_the_references_bits(columns, dtype, extreme, seed):
    rows_TD = _drawn(7, columns, 1, 1, dtype, extreme, seed)[0]
    found, expected = pack_rows_compiled(rows_TD), pack_rows_reference(rows_TD)
    same_bits(*(unpack_rows(one, columns, dtype).dequantized() for one in (found, expected)))
    finite = expected[:, columns:].ne(255).all(1)
    assert torch.equal(found[finite], expected[finite])


def test_every_fp32_exponent_rounds_as_the_reference_does():
    """All sixteen top bits, with and without some below them."""
    bits = (torch.arange(1 << 16, dtype=torch.int64) << 16).to(torch.int32)
    rows = torch.stack([bits, bits | 1, bits | 0x8000, bits | 0x7FFF]).view(torch.float32)
    rows = rows.flatten()[rows.flatten().isfinite()]
    rows_TD = torch.stack([rows, rows.roll(1)], dim=1)[: len(rows) // 64 * 64].reshape(-1, 128)
    assert torch.equal(pack_rows_compiled(rows_TD), pack_rows_reference(rows_TD))


def test_backend_selection(monkeypatch):
    monkeypatch.delenv("MORAY_KERNELS", raising=False)
    assert compiles(torch.zeros(1))
    assert not compiles(torch.zeros(1, dtype=torch.float64))
    rows = torch.randn(3, 130)
    assert torch.equal(pack_rows(rows.t().contiguous().t()), pack_rows_reference(rows))
    monkeypatch.setenv("MORAY_KERNELS", "reference")
    assert not compiles(torch.zeros(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows, tails, goes, inboxes: (rows.double(), tails, goes, inboxes), "rows_TD has dtype"),
        (lambda rows, tails, goes, inboxes: (rows, tails[:2], goes, inboxes), "metadata_TN has shape"),
        (lambda rows, tails, goes, inboxes: (rows, tails, goes[:, :2], inboxes), "sent_PT has shape"),
        (lambda rows, tails, goes, inboxes: (rows, tails, goes.int(), inboxes), "sent_PT has dtype"),
        (lambda rows, tails, goes, inboxes: (rows, tails, goes, inboxes[:1]), "sent_PT has shape"),
        (
            lambda rows, tails, goes, inboxes: (rows, tails, goes, [inboxes[0], inboxes[1][:, 1:]]),
            r"inboxes\[1\] has shape",
        ),
    ],
)
def test_wrong_arguments_are_named(change, message):
    rows_TD, metadata_TN, sent_PT = _drawn(3, 40, 2, 5, torch.float32, None, 1)
    inboxes = [torch.zeros(3, packed_width(40) + 5, dtype=torch.uint8) for _ in range(2)]
    with pytest.raises(ValueError, match=message):
        push_rows(*change(rows_TD, metadata_TN, sent_PT, inboxes))
