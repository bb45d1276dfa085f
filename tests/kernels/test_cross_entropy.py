import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.kernels import cross_entropy as module
from moray.kernels.cross_entropy import cross_entropy_sum, cross_entropy_sum_reference, cross_entropy_sum_triton
from tests.examples import examples
from tests.kernels.compare import draw


def _specimen(vocab, dtype, grads):
    def call():
        hidden = torch.empty(4, 16, dtype=dtype, requires_grad=grads)
        targets, keep = torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.bool)
        cross_entropy_sum_triton(hidden, torch.empty(vocab, 16, dtype=dtype), targets, keep)

    return call


SPECIMENS = {
    "cross entropy": _specimen(129280, torch.bfloat16, grads=False),
    "cross entropy with gradients": _specimen(129280, torch.bfloat16, grads=True),
    "cross entropy of an odd vocabulary": _specimen(50257, torch.bfloat16, grads=True),
    "cross entropy in FP32": _specimen(129280, torch.float32, grads=True),
}


def _case(dtype):
    hidden = torch.randn(13, 6, dtype=dtype, requires_grad=True)
    weight = torch.randn(9, 6, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, 9, (13,))
    targets[4] = -100
    return hidden, weight, targets, (targets >= 0) & (torch.arange(13) != 7)


@pytest.mark.parametrize("chunk", [1, 4, 13, None])
def test_equals_full_logits_with_gradients(chunk):
    hidden, weight, targets, keep = _case(torch.float64)
    loss, count = cross_entropy_sum(hidden, weight, targets, keep, chunk)
    full = F.cross_entropy((hidden @ weight.t())[keep], targets[keep], reduction="sum")
    losses = torch.full((13,), torch.nan, dtype=torch.float64)
    cross_entropy_sum(hidden, weight, targets, keep, chunk, losses=losses)
    each = F.cross_entropy(hidden @ weight.t(), targets.clamp(min=0), reduction="none")
    torch.testing.assert_close(losses, torch.where(keep, each, 0.0).detach(), rtol=1e-12, atol=0)
    assert count == 11
    torch.testing.assert_close(loss, full, rtol=1e-12, atol=0)
    ours = torch.autograd.grad(loss / count, (hidden, weight))
    theirs = torch.autograd.grad(full / count, (hidden, weight))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_large_logits_stay_finite():
    hidden = torch.tensor([[1e4, 0.0]])
    loss, _ = cross_entropy_sum(hidden, torch.eye(2), torch.tensor([1]), torch.tensor([True]))
    assert loss.item() == 1e4


def test_bfloat16_gradients_come_in_bfloat16_from_a_float32_loss():
    hidden, weight, targets, keep = _case(torch.bfloat16)
    loss, _ = cross_entropy_sum(hidden, weight, targets, keep, 4)
    loss.backward()
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    cross_entropy_sum(*wide, targets, keep)[0].backward()
    assert loss.dtype == torch.float32
    for ours, exact in zip((hidden, weight), wide, strict=True):
        assert ours.grad.dtype == torch.bfloat16
        # BF16 has 8 significant bits; logits, probabilities and results are each rounded once.
        torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=0.05, atol=0.05)


def test_nothing_counted_is_zero_with_zero_gradients():
    hidden, weight, targets, _ = _case(torch.float64)
    loss, count = cross_entropy_sum(hidden, weight, targets, torch.zeros(13, dtype=torch.bool))
    loss.backward()
    assert (loss.item(), count.item()) == (0.0, 0)
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_without_gradients_no_graph_is_kept():
    hidden, weight, targets, keep = _case(torch.float64)
    with torch.no_grad():
        assert not cross_entropy_sum(hidden, weight, targets, keep)[0].requires_grad


def _random(tokens, vocab, exponent, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = draw((tokens, 6), exponent, dtype, seed), draw((vocab, 6), 0, dtype, seed + 1)
    keep = torch.rand(tokens, generator=generator) > 0.3
    targets = torch.randint(0, vocab, (tokens,), generator=generator).where(keep, torch.tensor(-100))
    return hidden, weight, targets, keep


@given(
    tokens=st.sampled_from([1, 2, 13]),
    vocab=st.sampled_from([1, 9, 1000, 8193]),
    exponent=st.sampled_from([-100, 0, 3, 20]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=examples(15))
def test_a_chunks_loss_and_gradient_are_the_references_and_near_fp64(tokens, vocab, exponent, dtype, seed):
    case = _random(tokens, vocab, exponent, dtype, seed)
    losses, gradient = module._chunk_triton(*case, True)
    other_losses, other_gradient = module._chunk_reference(*case, True)
    loss, other_loss = losses.sum(), other_losses.sum()
    _, _, targets, keep = case
    logits = (case[0] @ case[1].t()).double().requires_grad_()
    exact = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    exact.backward()
    assert gradient.dtype == dtype
    # FP32 losses: of the sum of exponentials, of the subtraction of the peak, and of the sum over rows.
    peaks = logits.detach().abs().amax(1)[keep].sum()
    torch.testing.assert_close(loss.double(), exact.detach(), rtol=1e-5, atol=1e-6 * peaks.item() + 1e-6)
    torch.testing.assert_close(loss, other_loss, rtol=1e-5, atol=1e-6 * peaks.item() + 1e-6)
    # Rounded once to the dtype, after FP32's exponentials; denormals may go.
    rtol, atol = torch.finfo(dtype).eps / 2 + 1e-5, 1e-6
    torch.testing.assert_close(gradient.double(), logits.grad, rtol=rtol, atol=atol)
    torch.testing.assert_close(gradient, other_gradient, rtol=2 * rtol, atol=atol)
    assert not gradient[~keep].any()


@given(
    tokens=st.sampled_from([0, 1, 13]),
    chunk=st.sampled_from([1, 4, None]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=examples(15))
def test_the_chunked_loss_is_the_references(tokens, chunk, dtype, seed):
    *tensors, targets, keep = _random(tokens, 101, 0, dtype, seed)
    ours, theirs = ([tensor.clone().requires_grad_() for tensor in tensors] for _ in range(2))
    found = cross_entropy_sum_triton(*ours, targets, keep, chunk)
    expected = cross_entropy_sum_reference(*theirs, targets, keep, chunk)
    assert found[1] == expected[1]
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    (found[0] * 0.1).backward()
    (expected[0] * 0.1).backward()
    # Logits' gradients differ by one BF16 number at most; the products' sums by 13 times as much.
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=tolerance, atol=tolerance)


def test_infinite_and_nan_logits():
    inf, nan = float("inf"), float("nan")
    hidden = torch.tensor([[0, 1, -inf], [-inf, -inf, 2], [nan, 1, 2], [inf, 1, 2], [-inf, -inf, -inf], [nan, nan, 0]])
    # A product with the identity would make NaN of 0 * inf.
    rows = [module._chunk_triton, module._chunk_reference]
    results = []
    for implementation in rows:
        for row, logits in enumerate(hidden):
            keep, target = torch.tensor([row != 5]), torch.tensor([1 if row != 1 else 2])
            column = logits.unsqueeze(1).clone()
            loss, gradient = implementation(torch.ones(1, 1), column, target, keep, True)
            results.append((loss, gradient))
    half = len(hidden)
    for found, expected in zip(results[:half], results[half:], strict=True):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-6, atol=1e-7)
    assert [loss.isfinite().item() for loss, _ in results[:half]] == [True, True, False, False, False, True]
    assert [gradient.isfinite().all().item() for _, gradient in results[:half]] == [
        True,
        True,
        False,
        False,
        False,
        True,
    ]
    assert results[5] == (0, pytest.approx(torch.zeros(1, 3)))


def test_a_word_of_no_probability_after_a_block_of_them():
    """The running sum starts over a whole block of -inf."""
    column = torch.full((9000, 1), -float("inf"))
    column[8500], column[8600] = 1.0, 1.0
    loss, gradient = module._chunk_triton(torch.ones(1, 1), column, torch.tensor([8500]), torch.tensor([True]), True)
    torch.testing.assert_close(loss, torch.tensor([2.0]).log())
    assert gradient[0, 8500] == -0.5
    assert gradient[0, 8600] == 0.5
    assert gradient.count_nonzero() == 2


def test_a_kept_target_outside_of_the_vocabulary_shows():
    for target in (-1, 9, 2**40):
        hidden, weight, targets, keep = _random(2, 9, 0, torch.float32, 0)
        targets[:], keep[:] = target, True
        assert cross_entropy_sum_triton(hidden, weight, targets, keep)[0].isnan()


def test_wrong_arguments_are_named(monkeypatch):
    hidden, weight, targets, keep = _random(5, 9, 0, torch.float32, 0)
    with pytest.raises(ValueError, match=r"hidden_TD has shape \(5, 5\), expected \(any, 6\)"):
        cross_entropy_sum_triton(hidden[:, :5], weight, targets, keep)
    with pytest.raises(ValueError, match=r"hidden_TD has dtype torch.bfloat16, expected torch.float32"):
        cross_entropy_sum_triton(hidden.bfloat16(), weight, targets, keep)
    with pytest.raises(ValueError, match=r"weight_VD has dtype torch.float64"):
        cross_entropy_sum_triton(hidden, weight.double(), targets, keep)
    with pytest.raises(ValueError, match=r"targets_T has shape \(4,\), expected \(5\)"):
        cross_entropy_sum_triton(hidden, weight, targets[:4], keep)
    with pytest.raises(ValueError, match=r"targets_T has dtype torch.int32, expected torch.int64"):
        cross_entropy_sum_triton(hidden, weight, targets.int(), keep)
    with pytest.raises(ValueError, match="keep_T has strides"):
        cross_entropy_sum_triton(hidden, weight, targets, torch.ones(10, dtype=torch.bool)[::2])
    with pytest.raises(ValueError, match="keep_T is on device meta, expected cpu"):
        cross_entropy_sum_triton(hidden, weight, targets, keep.to("meta"))
    monkeypatch.setenv("MORAY_KERNELS", "triton")
    loss, _ = cross_entropy_sum(hidden.t().contiguous().t(), weight, targets.repeat_interleave(2)[::2], keep)
    torch.testing.assert_close(loss, cross_entropy_sum_reference(hidden, weight, targets, keep)[0])
    assert cross_entropy_sum(hidden.double(), weight.double(), targets, keep)[0].dtype == torch.float64
