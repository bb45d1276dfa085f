import torch

from moray.kernels.util.document_bounds import find_documents


def test_positions_restart_and_an_id_that_returns_is_a_new_document():
    found = find_documents(torch.tensor([[4, 4, 9, 4, 4], [0, 0, 0, 0, 0]]))
    assert found.positions_BT.tolist() == [[0, 1, 0, 0, 1], [0, 1, 2, 3, 4]]
    assert found.index_BT.tolist() == [[0, 0, 1, 2, 2], [0, 0, 0, 0, 0]]
    assert found.lengths == (2, 1, 2, 5)


def test_the_same_id_across_rows_is_two_documents():
    assert find_documents(torch.zeros(2, 3, dtype=torch.int64)).lengths == (3, 3)
