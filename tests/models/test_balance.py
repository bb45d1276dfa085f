import torch

from moray.models.balance import max_violation, update_router_biases


def test_biases_move_against_the_load_over_all_ranks(make_model):
    model = make_model()
    before = torch.stack([router.e_score_correction_bias.clone() for router in model.routers()])
    model.routers()[0].counts_E.copy_(torch.tensor([8, 4, 4, 4, 4, 4, 4, 0]))
    model.routers()[1].counts_E.copy_(torch.tensor([1, 0, 0, 0, 0, 0, 0, 0]))
    calls = []

    def reduce(counts_LE):
        calls.append(counts_LE.dtype)
        counts_LE *= 2  # a second rank with the same counts

    update = update_router_biases(model, 0.001, reduce)
    moved = torch.stack([router.e_score_correction_bias for router in model.routers()]) - before
    steps = torch.tensor([[-1.0, 0, 0, 0, 0, 0, 0, 1], [-1, 1, 1, 1, 1, 1, 1, 1]])
    torch.testing.assert_close(moved, 0.001 * steps, rtol=0, atol=1e-7)
    assert calls == [torch.int64]
    assert update.counts_LE[0].tolist() == [16, 8, 8, 8, 8, 8, 8, 0]
    assert update.max_vio_L.tolist() == [1.0, 7.0]
    assert not model.router_counts().any()


def test_no_tokens_move_nothing(make_model):
    model = make_model()
    before = [router.e_score_correction_bias.clone() for router in model.routers()]
    assert update_router_biases(model, 0.1).max_vio_L.tolist() == [0.0, 0.0]
    assert all(torch.equal(r.e_score_correction_bias, b) for r, b in zip(model.routers(), before, strict=True))


def test_a_dense_model_has_nothing_to_balance(make_model):
    assert update_router_biases(make_model(first_k_dense_replace=3), 0.1).counts_LE.shape == (0, 8)


def test_even_load_violates_nothing():
    assert max_violation(torch.tensor([[3, 3, 3], [0, 0, 9]])).tolist() == [0.0, 2.0]


def test_repeated_updates_even_out_a_skewed_router(make_model):
    model = make_model(n_group=1, topk_group=1)
    for router in model.routers():
        router.e_score_correction_bias.copy_(torch.tensor([0.5, 0, 0, 0, 0, 0, 0, -0.5]))
    ids = torch.randint(0, 50, (8, 32))
    worst = []
    for _ in range(60):
        model(ids)
        worst.append(update_router_biases(model, 0.02).max_vio_L.max().item())
    assert worst[-1] < 0.5 * worst[0]
