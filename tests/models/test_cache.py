import pytest
import torch

from moray.models.cache import LatentCache


@pytest.fixture
def cache(config):
    return LatentCache(config, blocks=4, block_size=4)


def test_storage_is_one_latent_and_one_key_per_token(cache):
    assert cache.storage.shape == (3, 4, 4, 8 + 4)


def test_a_view_writes_real_tokens_to_their_blocks_only(cache):
    view = cache.view(torch.tensor([[3, 4], [0, -1]]), torch.tensor([[2, 0], [3, -1]]))
    view.write(1, torch.arange(1.0, 5.0)[:, None].expand(4, 12).view(2, 2, 12))
    written = {tuple(at.tolist()): cache.storage[1][tuple(at)][0].item() for at in cache.storage[1, ..., 0].nonzero()}
    assert written == {(2, 3): 1.0, (0, 0): 2.0, (3, 0): 3.0}
    assert not cache.storage[[0, 2]].any()
    assert view.blocks(1)[view.tables_BN[0], :, 0].flatten().tolist() == [0, 0, 0, 1, 2, 0, 0, 0]
    assert view.positions_BT.tolist() == [[3, 4], [0, -1]]
    assert view.tables_BN.tolist() == [[2, 0], [3, 0]]


def test_a_position_beyond_the_table_is_refused(cache):
    with pytest.raises(ValueError, match="position 8 lies beyond the 8 slots"):
        cache.view(torch.tensor([[8]]), torch.tensor([[0, 1]]))


def test_an_empty_cache_is_refused(config):
    with pytest.raises(ValueError, match="blocks = 0"):
        LatentCache(config, blocks=0)


def test_a_model_decodes_the_same_with_either_backend(make_model, monkeypatch):
    model = make_model(torch.float32, num_hidden_layers=2)
    ids = torch.tensor([[0, 7, 8, 9, 10], [1, 2, 3, 4, 5]])
    positions = torch.tensor([[-1, 0, 1, 2, 3], [0, 1, 2, 3, 4]])
    tables = torch.tensor([[3, -1, -1], [1, 0, -1]])
    logits = []
    for backend in ("reference", "triton"):
        monkeypatch.setenv("MORAY_KERNELS", backend)
        cache = LatentCache(model.config, blocks=4, block_size=4)
        prompt = model.forward_cached(ids, positions, cache, tables)
        next_one = model.forward_cached(
            ids[:, :1], positions[:, -1:] + 1, cache, torch.tensor([[3, 2, -1], [1, 0, -1]])
        )
        logits += [torch.cat([prompt[positions >= 0], next_one[:, 0]])]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-4)
