import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moray.kernels.quantize import COLUMN_TILES, dequantize, quantize
from moray.kernels.wire import pack_rows, packed_width, quantize_rows, unpack_rows
from tests.kernels.compare import same_bits


@given(
    rows=st.sampled_from([0, 1, 5, 130]),
    columns=st.sampled_from([1, 24, 128, 129, 300]),
    decades=st.sampled_from([0.0, 3.0, 20.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    extreme=st.sampled_from([None, 0.0, 448.0, 1e-30, 1e-42, float("inf"), float("nan")]),
    seed=st.integers(0, 2**31),
)
def test_a_packed_row_unpacks_to_its_quantization_and_packs_to_itself(rows, columns, decades, dtype, extreme, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x = (x * 10 ** (decades * (torch.rand(rows, columns, generator=generator) - 0.5))).to(dtype)
    if extreme is not None:
        x[::2, ::3] = extreme
    packed = pack_rows(x)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_width(columns))
    read = unpack_rows(packed, columns, dtype).dequantized()
    same_bits(quantize_rows(x).dequantized(), read)
    same_bits(read, dequantize(*quantize(x, power_of_two=True), dtype=dtype))
    same_bits(unpack_rows(pack_rows(read), columns, dtype).dequantized(), read)


def test_a_packed_row_loses_nothing_more_when_its_columns_are_quantised():
    x = torch.randn(256, 300, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 300)
    read = unpack_rows(pack_rows(x), 300, torch.float32).dequantized()
    near = read.abs() > read.abs().amax(0) * 2.0**-13
    transposed = dequantize(*quantize(read, COLUMN_TILES, power_of_two=True), COLUMN_TILES)
    assert torch.equal(transposed[near], read[near])


def test_a_number_takes_little_more_than_a_byte():
    assert packed_width(7168) / 7168 == 1 + 1 / 128


def test_bytes_of_another_width_are_refused():
    with pytest.raises(ValueError, match="bytes_TW has 10 columns, rows of 10 take 11"):
        unpack_rows(torch.zeros(2, 10, dtype=torch.uint8), 10, torch.float32)
