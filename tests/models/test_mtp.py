import dataclasses

import pytest
import torch

from moray.models.model import DeepseekV3
from moray.models.mtp import shift_left
from moray.models.presets import parameter_count

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def _model(make_model, depths=2):
    return make_model(num_nextn_predict_layers=depths).train()


def _targets(ids_BT, documents_BT):
    """The next token of the same document, else ignored."""
    next_BT = shift_left(ids_BT, 1, -100)
    return torch.where(shift_left(documents_BT, 1, -1) == documents_BT, next_BT, -100)


def test_shift_left():
    row = torch.tensor([[1, 2, 3]])
    assert [shift_left(row, places, 0).tolist() for places in (0, 2, 3, 9)] == [
        [[1, 2, 3]],
        [[3, 0, 0]],
        [[0] * 3],
        [[0] * 3],
    ]


@pytest.mark.parametrize("with_documents", [True, False])
def test_no_mtp_target_crosses_a_document_boundary(make_model, with_documents):
    """Packed documents give the sum of the separate documents, also if attention does not separate them."""
    model = _model(make_model)
    ids = torch.randint(0, 50, (1, 16))
    lengths = [7, 1, 2, 6]
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    targets = _targets(ids, documents)
    packed = model.training_loss(ids, targets, documents if with_documents else None)
    assert packed.count == 16 - 4
    if with_documents:
        alone = [model.training_loss(part, _targets(part, part * 0)) for part in ids.split(lengths, 1)]
        for term in ("main", "mtp"):
            expected = sum(getattr(loss, term) for loss in alone)
            torch.testing.assert_close(getattr(packed, term), expected, **EXACT)
    # Predictions across a document boundary must not matter: here only the first two positions count.
    cut = targets.clone()
    cut[:, 2:] = -100
    first = model.training_loss(ids, cut, documents if with_documents else None)
    changed = ids.clone()
    changed[:, 3:] = (changed[:, 3:] + 1) % 50
    again = model.training_loss(changed, cut, documents if with_documents else None)
    torch.testing.assert_close(first.mtp, again.mtp, **EXACT)


def test_sequences_too_short_for_mtp_have_no_mtp_loss(make_model):
    model = _model(make_model)
    loss = model.training_loss(torch.tensor([[3]]), torch.tensor([[4]]))
    assert loss.mtp == 0
    assert loss.main > 0
    loss.mtp.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_masked_places_count_nowhere(make_model):
    model = _model(make_model, 1)
    ids, targets = torch.randint(0, 50, (2, 2, 9)).unbind(0)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, 4] = False
    loss = model.training_loss(ids, targets, mask_BT=mask)
    ignored = targets.masked_fill(~mask, -100)
    same = model.training_loss(ids, ignored)
    assert loss.count == same.count == 16
    torch.testing.assert_close((loss.main, loss.mtp), (same.main, same.mtp), rtol=0, atol=0)


def test_embedding_and_head_are_shared_and_the_parameter_count_is_right(config):
    config = dataclasses.replace(config, num_nextn_predict_layers=2)
    with torch.device("meta"):
        model = DeepseekV3(config)
    count = parameter_count(config)
    assert sum(p.numel() for p in model.parameters()) == count.total + count.mtp
    assert count.total == parameter_count(config.without_mtp()).total
    assert count.active == parameter_count(config.without_mtp()).active


def test_every_term_of_the_loss_has_gradients_where_it_should(make_model):
    model = _model(make_model, 1)
    ids = torch.randint(0, 50, (2, 9))

    def touched(term):
        model.zero_grad()
        getattr(model.training_loss(ids, ids.flip(1)), term).backward()
        return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}

    mtp_only = {name for name, _ in model.named_parameters() if name.startswith("model.layers.3.")}
    assert not touched("main") & mtp_only
    assert touched("mtp") >= mtp_only | {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}
    balanced = touched("balance")
    assert {f"model.layers.{layer}.mlp.gate.weight" for layer in (1, 2, 3)} <= balanced
    assert not any("lm_head" in name or ("experts.w" in name and "layers.3" in name) for name in balanced)


def test_positions_without_mtp_target_do_not_count_for_the_load(make_model):
    """The last two positions of a document at depth 2: their tokens change neither counts nor balance."""
    model = _model(make_model, 2)
    ids = torch.randint(0, 50, (1, 12))
    documents = torch.tensor([[0] * 5 + [1] * 7])
    targets = _targets(ids, documents)
    targets[0, -1] = -100
    model.training_loss(ids, targets, documents)
    counts = model.router_counts().sum(-1).tolist()
    assert counts == [12 * 2, 12 * 2, (3 + 5) * 2, (2 + 4) * 2]


def test_evaluation_has_neither_mtp_loss_nor_counts(make_model):
    model = _model(make_model, 1).eval()
    ids = torch.randint(0, 50, (2, 9))
    with torch.no_grad():
        loss = model.training_loss(ids, ids.flip(1))
    assert not model.router_counts().any()
    assert loss.balance == 0
    torch.testing.assert_close(loss.main, model.loss_sum(ids, ids.flip(1))[0])


def test_the_biases_of_mtp_layers_are_updated(make_model):
    from moray.models.balance import update_router_biases

    model = _model(make_model, 1)
    ids = torch.randint(0, 50, (2, 9))
    model.training_loss(ids, ids.flip(1))
    counts = model.router_counts()
    # At the last position the MTP layer has no target.
    assert counts.sum(-1).tolist() == [2 * 9 * 2, 2 * 9 * 2, 2 * 8 * 2]
    before = dict((name, bias.clone()) for name, bias in model.logical_biases())
    update_router_biases(model, 0.001)
    name = "model.layers.3.mlp.gate.e_score_correction_bias"
    assert not torch.equal(before[name], dict(model.logical_biases())[name])
