import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.kernels.permute import move_rows, sort_pairs, spread_rows


@given(tokens=st.integers(0, 12), slots=st.integers(1, 4), experts=st.integers(1, 6), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_the_order_sorts_stably_and_the_inverse_undoes_it(tokens, slots, experts, seed):
    ids_TK = torch.randint(0, experts, (tokens, slots), generator=torch.Generator().manual_seed(seed))
    pairs = sort_pairs(ids_TK, experts)
    flat = ids_TK.flatten().tolist()
    assert pairs.order_R.tolist() == sorted(range(len(flat)), key=lambda pair: flat[pair])
    assert pairs.order_R[pairs.inverse_R].tolist() == list(range(len(flat)))
    assert pairs.counts_E.tolist() == [flat.count(e) for e in range(experts)]


def test_rows_travel_there_and_back_with_gradients():
    x_TD = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    pairs = sort_pairs(torch.randint(0, 4, (5, 2)), 4)

    def there_and_back(x):
        rows = spread_rows(x, pairs, 2)
        return move_rows(rows, pairs.inverse_R, pairs.order_R)

    assert torch.equal(there_and_back(x_TD), x_TD.repeat_interleave(2, dim=0))
    assert torch.autograd.gradcheck(there_and_back, x_TD)
