import contextlib
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.kernels.attention import (
    attention_backend,
    causal_attention,
    causal_attention_reference,
    causal_attention_triton,
)
from moray.kernels.attention_tiles import KernelBlocks, TileShape
from moray.kernels.rope import rope_table
from moray.kernels.util.document_bounds import find_documents
from moray.models.attention import LatentAttention, RotaryTable
from moray.models.config import ModelConfig
from moray.models.recompute import Recompute
from tests.examples import examples
from tests.kernels.compare import draw

SMALL = KernelBlocks(TileShape(16, 16, 4, 1), TileShape(16, 16, 4, 1), TileShape(16, 16, 4, 1))
UNEVEN = KernelBlocks(TileShape(32, 16, 4, 1), TileShape(16, 32, 4, 1), TileShape(16, 32, 4, 1))


def _specimen(width, value_width, dtype):
    """Forward and backward; documents' places are numbers on the device, so any will do."""
    q, k = (torch.zeros(2, 256, 4, width, dtype=dtype, requires_grad=True) for _ in range(2))
    v = torch.zeros(2, 256, 4, value_width, dtype=dtype, requires_grad=True)
    documents = find_documents(torch.zeros(2, 256, dtype=torch.int64))

    def call():
        out = causal_attention_triton(q, k, v, 0.1, documents)
        out.backward(torch.zeros_like(out))

    return call


SPECIMENS = {
    "attention 192 128": _specimen(192, 128, torch.bfloat16),
    "attention 48 32": _specimen(48, 32, torch.bfloat16),
    "attention fp32": _specimen(192, 128, torch.float32),
}


def _inputs(batch, length):
    q, k = torch.randn(2, batch, length, 3, 12, dtype=torch.float64, requires_grad=True).unbind(0)
    return q, k, torch.randn(batch, length, 3, 8, dtype=torch.float64, requires_grad=True)


def _plain(q, k, v, scale, seen_BTT):
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    weights = scores.masked_fill(~seen_BTT[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v)


@pytest.mark.parametrize("lengths_on_host", [True, False])
@pytest.mark.parametrize("ids", [None, [[1, 1, 1, 2, 2, 3, 3], [5, 5, 5, 5, 5, 5, 5]], [[1] * 7, [1] * 7]])
def test_equals_plain_softmax_with_gradients(ids, lengths_on_host):
    q, k, v = _inputs(2, 7)
    documents = None
    seen = torch.ones(2, 7, 7, dtype=torch.bool).tril()
    if ids is not None:
        ids = torch.tensor(ids)
        documents = find_documents(ids)
        if not lengths_on_host:
            documents = dataclasses.replace(documents, lengths=None)
        seen &= ids[:, :, None] == ids[:, None, :]
    ours, plain = causal_attention(q, k, v, 0.3, documents), _plain(q, k, v, 0.3, seen)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    factor = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad((ours * factor).sum(), (q, k, v)),
        torch.autograd.grad((plain * factor).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_wide_values_are_refused():
    q, k, _ = _inputs(1, 2)
    with pytest.raises(ValueError, match="value heads of 20"):
        causal_attention(q, k, torch.zeros(1, 2, 3, 20, dtype=torch.float64), 1.0)


def _strided(x):
    """The same numbers with other strides, the last still 1."""
    return (
        torch.stack([x, torch.full_like(x, float("nan"))], dim=3)
        .transpose(1, 2)
        .contiguous()
        .transpose(1, 2)[..., 0, :]
    )


def _both(q, k, v, documents, dtype, scale, blocks):
    """(output, gradients) of the Triton form on rows of `dtype`, and of the reference on the same rows in float64."""
    factor = draw((*q.shape[:3], v.shape[-1]), seed=9)
    results = []
    for run, wide in ((causal_attention_triton, dtype), (causal_attention_reference, torch.float64)):
        rows = [x.detach().to(dtype).to(wide).requires_grad_() for x in (q, k, v)]
        strided = [_strided(x) for x in rows]
        out = run(*strided, scale, documents, **({"blocks": blocks} if run is causal_attention_triton else {}))
        results.append((out, torch.autograd.grad(out, rows, factor.to(dtype).to(wide))))
    return results


@given(
    batch=st.sampled_from([1, 2]),
    length=st.sampled_from([1, 2, 16, 17, 31, 47]),
    heads=st.sampled_from([1, 2]),
    widths=st.sampled_from([(16, 16), (12, 8), (48, 32), (40, 17), (33, 1)]),
    cut=st.sampled_from([None, 0.0, 0.1, 0.5, 1.0]),
    exponent=st.sampled_from([-2, 0, 4]),
    blocks=st.sampled_from([SMALL, UNEVEN]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=examples(12))
def test_triton_in_fp32_equals_the_reference_in_float64(batch, length, heads, widths, cut, exponent, blocks, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (draw((batch, length, heads, width), seed=seed + i) for i, width in enumerate((widths[0], *widths)))
    q = q * 2.0**exponent
    documents = None
    if cut is not None:
        documents = find_documents((torch.rand(batch, length, generator=generator) < cut).cumsum(1))
    (out, grads), (expected, expected_grads) = _both(q, k, v, documents, torch.float32, 0.25, blocks)
    assert out.is_contiguous()
    # FP32 scores are off by 2^-24 for each of some addends as large as themselves, weights by as much.
    error = 2.0**-20 * (1 + torch.einsum("bthd,bshd->bhts", q, k).abs().max().item())
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=error * v.abs().max().item())
    # A weight's gradient is at most this large; a column of weights sums up to at most `length`.
    size = v.norm(dim=-1).max().item() * 5 * widths[1] ** 0.5
    for found, want, largest in zip(
        grads, expected_grads, (k.abs().max(), q.abs().max() * length, length), strict=True
    ):
        torch.testing.assert_close(found.double(), want, rtol=0, atol=error * size * float(largest))


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-11)])
def test_rounding_is_that_of_weights_and_results(dtype, unit):
    """The unit of BF16 is twice what it is on a GPU: Triton's interpreter cuts bits off where a GPU rounds."""
    q, k, v = (draw((1, 50, 2, width), seed=i) for i, width in enumerate((48, 48, 32)))
    documents = find_documents(torch.tensor([[0] * 21 + [1] * 29]))
    (out, grads), (expected, expected_grads) = _both(q, k, v, documents, dtype, 48**-0.5, UNEVEN)
    assert out.dtype == dtype
    assert (out.double() - expected).abs().max() <= 2 * unit * v.abs().max()
    for found, want in zip(grads, expected_grads, strict=True):
        assert found.dtype == dtype
        assert (found.double() - want).norm() <= 3 * unit * want.norm()


def test_a_nan_reaches_exactly_the_queries_that_see_it():
    q, k, v = (draw((1, 20, 1, 16), seed=i) for i in range(3))
    documents = find_documents(torch.tensor([[0] * 16 + [1] * 4]))
    q[0, 3] = float("nan")
    out = causal_attention_triton(q, k, v, 0.25, documents, SMALL)
    assert out.isnan().all(-1).flatten().tolist() == [place == 3 for place in range(20)]
    k[0, 9] = float("nan")
    out = causal_attention_triton(q, k, v, 0.25, documents, SMALL)
    assert out.isnan().all(-1).flatten().tolist() == [place == 3 or 9 <= place < 16 for place in range(20)]


def test_no_tokens():
    q, v = torch.zeros(2, 0, 3, 16, requires_grad=True), torch.zeros(2, 0, 3, 8)
    out = causal_attention_triton(q, q, v, 1.0)
    assert out.shape == (2, 0, 3, 8)
    out.sum().backward()
    assert q.grad.shape == q.shape


def test_the_backend_switch(monkeypatch):
    monkeypatch.setenv("MORAY_KERNELS", "triton")
    assert attention_backend(torch.zeros(1)) == "triton"
    assert attention_backend(torch.zeros(1, dtype=torch.float64)) == "reference"
    q, k, v = (draw((1, 9, 2, width), seed=i) for i, width in enumerate((16, 16, 8)))
    found = causal_attention(q.transpose(1, 3).contiguous().transpose(1, 3), k, v, 0.25)
    torch.testing.assert_close(found, causal_attention_reference(q, k, v, 0.25), rtol=1e-5, atol=1e-5)


def test_attention_of_a_model_with_recompute_on_both_backends(monkeypatch):
    config = ModelConfig(
        vocab_size=8,
        hidden_size=24,
        intermediate_size=8,
        moe_intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        n_routed_experts=2,
        num_experts_per_tok=1,
        kv_lora_rank=8,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=5,
        q_lora_rank=10,
    )
    module = LatentAttention(config)
    for index, parameter in enumerate(module.parameters()):
        parameter.data = draw(parameter.shape, -2, seed=index)
    x, factor = draw((2, 9, 24), seed=50).requires_grad_(), draw((2, 9, 24), seed=51)
    documents = find_documents(torch.tensor([[0] * 9, [0] * 4 + [1] * 5]))
    rotary = RotaryTable(*rope_table(documents.positions_BT, 4, 10_000.0, torch.float32))
    gradients = []
    for backend in ("reference", "triton"):
        monkeypatch.setenv("MORAY_KERNELS", backend)
        with Recompute(True) as recompute:
            out = module(x, rotary, documents, recompute)
        gradients.append(torch.autograd.grad((out * factor).sum(), [x, *module.parameters()]))
    for found, want in zip(*gradients, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-4 * want.abs().max().item())


def test_wrong_arguments_are_named():
    x = torch.zeros(1, 4, 2, 16)
    with pytest.raises(ValueError, match=r"q_BTHA has shape \(4, 2, 16\), expected \(any, any, any, any\)"):
        causal_attention_triton(x[0], x, x, 1.0)
    with pytest.raises(ValueError, match=r"q_BTHA has dtype torch.float64, expected torch.float32 or"):
        causal_attention_triton(x.double(), x, x, 1.0)
    with pytest.raises(ValueError, match=r"k_BTHA has dtype torch.float16, expected torch.float32"):
        causal_attention_triton(x, x.half(), x, 1.0)
    with pytest.raises(ValueError, match=r"v_BTHV has shape \(1, 3, 2, 16\), expected \(1, 4, 2, any\)"):
        causal_attention_triton(x, x, x[:, :3], 1.0)
    with pytest.raises(ValueError, match=r"k_BTHA has strides \(.*\), expected \(any, any, any, 1\)"):
        causal_attention_triton(x, x.transpose(2, 3).contiguous().transpose(2, 3), x, 1.0)
    with pytest.raises(ValueError, match=r"v_BTHV is on device meta, expected cpu"):
        causal_attention_triton(x, x, x.to("meta"), 1.0)
    with pytest.raises(ValueError, match="value heads of 20 are wider than query heads of 16"):
        causal_attention_triton(x, x, torch.zeros(1, 4, 2, 20), 1.0)
    with pytest.raises(ValueError, match=r"scale = -1\.0, expected a positive number"):
        causal_attention_triton(x, x, x, -1.0)
    with pytest.raises(ValueError, match=r"documents.positions_BT has shape \(1, 3\), expected \(1, 4\)"):
        causal_attention_triton(x, x, x, 1.0, find_documents(torch.zeros(1, 3, dtype=torch.int64)))
    wide = torch.zeros(1, 1, 1, 257)
    with pytest.raises(ValueError, match="query heads of 257, expected 256 at most"):
        causal_attention_triton(wide, wide, wide, 1.0)


@pytest.mark.parametrize("suits", [False, True])
def test_whole_rows_go_to_cudnn_where_it_suits_and_documents_do_not(monkeypatch, suits):
    q, k, v = (draw((2, 9, 3, width), seed=width).requires_grad_() for width in (12, 12, 8))
    asked = []

    def sdpa(*arguments, **options):
        asked.append(options)
        return _sdpa(*arguments, **options)

    _sdpa = F.scaled_dot_product_attention
    monkeypatch.setenv("MORAY_KERNELS", "triton")
    monkeypatch.setattr("moray.kernels.attention._suits_cudnn", lambda *_: suits)
    monkeypatch.setattr("moray.kernels.attention.sdpa_kernel", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)
    out = causal_attention(q, k, v, 0.25)
    assert [one["is_causal"] for one in asked] == ([True] if suits else [])
    found = torch.autograd.grad(out.square().sum(), (q, k, v))
    expected = torch.autograd.grad(causal_attention_reference(q, k, v, 0.25).square().sum(), (q, k, v))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    asked.clear()
    causal_attention(q, k, v, 0.25, find_documents(torch.zeros(2, 9, dtype=torch.int64)))
    assert not asked
