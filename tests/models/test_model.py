import pytest
import torch

from moray.models.cache import LatentCache
from moray.models.expert_parallel.dispatcher import LocalDispatcher
from moray.models.model import DeepseekV3
from moray.models.tensors import bias_shapes, parameter_shapes
from moray.models.yarn import Yarn

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def test_names_and_shapes_are_those_of_the_config(make_model):
    for variant in ({"num_nextn_predict_layers": 2}, {"q_lora_rank": None, "n_shared_experts": 0}):
        model = make_model(**variant)
        found = {name: tuple(view.shape) for name, view, _ in model.logical_parameters()}
        assert found == parameter_shapes(model.config)
        assert {name: tuple(b.shape) for name, b in model.logical_biases()} == bias_shapes(model.config)


def test_views_write_through_to_the_module(make_model):
    model = make_model()
    views = {name: view for name, view, _ in model.logical_parameters()}
    views["model.layers.1.mlp.experts.5.down_proj.weight"].fill_(7.0)
    assert (model.shards()[0].w_down_EDF[5] == 7.0).all()
    assert (model.shards()[0].w_down_EDF[4] != 7.0).all()


def test_initialisation_does_not_depend_on_the_layout_or_dtype(config):
    whole = DeepseekV3(config)
    part = DeepseekV3(config, range(4, 6), LocalDispatcher()).double()
    whole.init_weights(11)
    part.init_weights(11)
    reference = {name: view for name, view, _ in whole.logical_parameters()}
    for name, view, _ in part.logical_parameters():
        assert torch.equal(view, reference[name].double()), name
    other = DeepseekV3(config)
    other.init_weights(12)
    assert not torch.equal(other.lm_head.weight, whole.lm_head.weight)


def test_initial_weights_have_the_configs_spread(config):
    model = DeepseekV3(config)
    model.init_weights(0)
    for name, view, _ in model.logical_parameters():
        if name.endswith("norm.weight"):
            assert (view == 1).all()
        else:
            # The standard error of a spread over n draws is spread / sqrt(2n); five of them.
            assert abs(view.std() / 0.3 - 1) < 5 / (2 * view.numel()) ** 0.5, name


def test_an_uninitialised_model_gives_nan(config):
    assert DeepseekV3(config)(torch.zeros(1, 2, dtype=torch.int64)).logits.isnan().all()


@pytest.mark.parametrize("experts", [range(0), range(0, 8, 2), range(6, 10), range(-1, 3)])
def test_bad_expert_ranges_are_refused(config, experts):
    with pytest.raises(ValueError, match="consecutive ids of the 8 experts"):
        DeepseekV3(config, experts, LocalDispatcher())


def test_part_of_the_experts_needs_a_dispatcher(config):
    with pytest.raises(ValueError, match="a dispatcher must reach the others"):
        DeepseekV3(config, range(0, 4))


def test_rows_longer_than_the_model_are_refused(make_model):
    with pytest.raises(ValueError, match="max_position_embeddings = 64"):
        make_model()(torch.zeros(1, 65, dtype=torch.int64))


def test_packed_documents_equal_separate_passes(make_model):
    model = make_model()
    ids = torch.randint(0, 50, (2, 20))
    document_ids = torch.tensor([[0] * 7 + [1] * 1 + [2] * 12, [5] * 11 + [6] * 9])
    packed = model(ids, document_ids).logits
    for row, begin, end in [(0, 0, 7), (0, 7, 8), (0, 8, 20), (1, 0, 11), (1, 11, 20)]:
        alone = model(ids[row : row + 1, begin:end]).logits
        torch.testing.assert_close(packed[row, begin:end], alone[0], **EXACT)


def test_loss_sum_counts_by_mask_and_targets(make_model):
    model = make_model()
    ids = torch.randint(0, 50, (2, 9))
    targets = torch.randint(0, 50, (2, 9))
    targets[0, 3] = -100
    mask = torch.rand(2, 9) < 0.6
    documents = torch.tensor([[0] * 4 + [1] * 5] * 2)
    nll, count = model.loss_sum(ids, targets, documents, mask)
    keep = mask & (targets >= 0)
    log_probs = model(ids, documents).logits.log_softmax(-1)
    expected = -log_probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0][keep].sum()
    assert count == keep.sum()
    torch.testing.assert_close(nll, expected, **EXACT)


YARN = Yarn(4.0, 16, mscale=0.707, mscale_all_dim=1.0)


@pytest.mark.parametrize("variant", [{"rope_scaling": YARN}, {"q_lora_rank": None, "first_k_dense_replace": 0}])
def test_prefill_and_decode_equal_the_full_forward(make_model, variant):
    model = make_model(**variant).eval()
    lengths, block = [11, 5], 4
    ids = torch.randint(0, 50, (2, 14))
    full = model(ids).logits
    cache = LatentCache(model.config, blocks=9, block_size=block, dtype=torch.float64)
    tables = torch.tensor([[1, 2, 3, 4], [8, 7, 6, 5]])

    padded = torch.full((2, 11), -1)
    for row, length in enumerate(lengths):
        padded[row, :length] = torch.arange(length)
    prefill = model.forward_cached(ids[:, :11], padded, cache, tables)
    last = model.forward_cached(ids[:, :11], padded, cache, tables, last_only=True)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(prefill[row, :length], full[row, :length], **EXACT)
        torch.testing.assert_close(last[row, 0], full[row, length - 1], **EXACT)

    for step in range(3):
        positions = torch.tensor([[length + step] for length in lengths])
        logits = model.forward_cached(ids.gather(1, positions), positions, cache, tables)
        for row, length in enumerate(lengths):
            torch.testing.assert_close(logits[row, 0], full[row, length + step], **EXACT)


def test_prefill_in_chunks_equals_the_full_forward(make_model):
    model = make_model().eval()
    ids = torch.randint(0, 50, (1, 10))
    cache = LatentCache(model.config, blocks=3, block_size=4, dtype=torch.float64)
    tables = torch.tensor([[2, 0, 1]])
    parts = [
        model.forward_cached(ids[:, part], torch.arange(10)[None, part], cache, tables)
        for part in (slice(0, 3), slice(3, 9), slice(9, 10))
    ]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, **EXACT)


def test_bfloat16_trains_with_float32_router_and_loss(make_model):
    model = make_model(torch.bfloat16)
    ids = torch.randint(0, 50, (2, 9))
    nll, count = model.loss_sum(ids, ids)
    (nll / count).backward()
    assert nll.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    wide, _ = make_model(torch.float32).loss_sum(ids, ids)
    # BF16 rounds each of some twenty operations in a row by up to 0.4 %.
    torch.testing.assert_close(nll, wide, rtol=0.1, atol=0)
