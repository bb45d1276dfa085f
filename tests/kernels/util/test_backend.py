import pytest
import torch
import triton
import triton.language as tl

from moray.kernels.util.arguments import check_tensor
from moray.kernels.util.backend import backend, row_offset, to_e4m3
from tests.kernels.compare import same_bits


@triton.jit
def _cast(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, to_e4m3(tl.load(x_ptr + at, mask=at < n, other=0.0)), mask=at < n)


@triton.jit
def _place(index_ptr, out_ptr, stride):
    at = tl.arange(0, 4)
    tl.store(out_ptr + at, row_offset(tl.load(index_ptr + at), stride))


def test_the_cast_is_torchs_for_every_number_edge_and_neighbour():
    """Triton's interpreter makes 16 of 31 and 384 of NaN by itself (3.6.0, 3.7.1)."""
    grid = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (grid[1:] + grid[:-1]) / 2
    near = [middle * (1 + 1e-6), middle * (1 - 1e-6)]
    odd = torch.tensor([float("nan"), 0.0, 2.0**-10, 1e-30, 1e-42])
    x = torch.cat([grid, middle, *near, odd, torch.randn(4000) * 100, torch.randn(4000) * 0.01]).clamp(-448, 448)
    x = torch.cat([x, -x])
    found = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    _cast[(triton.cdiv(len(x), 128),)](x, found, len(x), BLOCK=128)
    same_bits(found, x.to(torch.float8_e4m3fn))


def test_places_beyond_two_to_the_31st():
    """A matrix of 300,000 x 18,432 has 5.5 billion elements; 32 bits would come out negative."""
    index = torch.tensor([0, 1, 116_509, 300_000], dtype=torch.int32)
    found = torch.empty(4, dtype=torch.int64)
    _place[(1,)](index, found, 18_432)
    assert found.tolist() == [row * 18_432 for row in index.tolist()]


def test_the_cpu_runs_references_by_default(monkeypatch):
    x = torch.zeros(1)
    monkeypatch.delenv("MORAY_KERNELS", raising=False)
    assert backend(x) == "reference"
    monkeypatch.setenv("MORAY_KERNELS", "triton")
    assert backend(x) == "triton"
    monkeypatch.setenv("MORAY_KERNELS", "cuda")
    with pytest.raises(ValueError, match="MORAY_KERNELS=cuda: expected one of reference, triton"):
        backend(x)


def test_wrong_arguments_are_named_with_the_expected_value():
    x = torch.zeros(4, 6)
    with pytest.raises(ValueError, match=r"x has shape \(4, 6\), expected \(any, 8\)"):
        check_tensor("x", x, (None, 8), (torch.float32,))
    with pytest.raises(ValueError, match=r"x has dtype torch.float32, expected torch.bfloat16"):
        check_tensor("x", x, (4, 6), (torch.bfloat16,))
    with pytest.raises(ValueError, match=r"x has strides \(1, 6\), expected a contiguous tensor"):
        check_tensor("x", x.t(), (6, 4), (torch.float32,))
    with pytest.raises(ValueError, match="x is on device cpu, expected meta"):
        check_tensor("x", x, (4, 6), (torch.float32,), like=x.to("meta"))
    with pytest.raises(ValueError, match=r"x has strides \(6, 1\), expected \(any, 6\)"):
        check_tensor("x", x, (4, 6), (torch.float32,), strides=(None, 6))
