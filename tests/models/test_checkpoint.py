import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import moray
from moray.models import safetensors_folder
from moray.models.checkpoint import CheckedFolder, load, save, write_folder
from moray.models.expert_parallel.dispatcher import LocalDispatcher
from moray.models.tensors import checkpoint_shapes, stored_tensors


def _contents(model):
    return dict([(name, view) for name, view, _ in model.logical_parameters()] + list(model.logical_biases()))


def _assert_same(a, b):
    a, b = _contents(a), _contents(b)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_float32_survives_bit_for_bit(make_model, tmp_path):
    model = make_model(torch.float32)
    moray.models.save(model, tmp_path)
    loaded = moray.models.load(tmp_path)
    _assert_same(model, loaded)
    assert loaded.config == model.config
    assert not loaded.training
    assert not loaded.router_counts().any()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_shards_hold_the_same_and_replace_an_earlier_model(make_model, tmp_path):
    model = make_model(torch.float32)
    save(model, tmp_path)
    save(model, tmp_path, shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    names = {path.name for path in tmp_path.iterdir()} - {"config.json", "model.safetensors.index.json"}
    assert names == set(index["weight_map"].values())
    assert len(names) > 2
    assert all(sum(t.nbytes for t in load_file(tmp_path / name).values()) <= 20_000 for name in names)
    assert set(index["weight_map"]) == set(checkpoint_shapes(model.config))
    _assert_same(model, load(tmp_path))
    save(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_bf16_rounds_weights_and_keeps_biases(make_model, tmp_path):
    model = make_model(torch.float32)
    save(model, tmp_path, "bf16")
    stored = load_file(tmp_path / "model.safetensors")
    for name, tensor in _contents(model).items():
        expected = tensor if name.endswith("bias") else tensor.bfloat16()
        assert torch.equal(stored[name], expected), name
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    half = load(tmp_path, torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.bfloat16
    assert half.routers()[0].e_score_correction_bias.dtype == torch.float32
    assert torch.equal(half.routers()[0].e_score_correction_bias, model.routers()[0].e_score_correction_bias)


def test_a_range_of_experts_loads_its_own(make_model, tmp_path):
    model = make_model(torch.float32)
    save(model, tmp_path)
    part = load(tmp_path, experts=range(2, 4), dispatcher=LocalDispatcher())
    assert torch.equal(part.shards()[0].w_up_EFD, model.shards()[0].w_up_EFD[2:4])
    with pytest.raises(ValueError, match=r"experts range\(2, 4\) of 8"):
        save(part, tmp_path / "again")


def test_an_unknown_precision_is_refused(make_model, tmp_path):
    with pytest.raises(ValueError, match="'int4' must be one of float32, bf16, fp8"):
        save(make_model(torch.float32), tmp_path, "int4")


NAME = "model.layers.2.mlp.experts.5.up_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop(NAME), f"tensor '{NAME}' is missing"),
        (lambda t: t.update({"model.layers.3.stray.weight": torch.zeros(1)}), "tensor 'model.layers.3.stray.weight'"),
        (
            lambda t: t.update({NAME: torch.zeros(3, 2)}),
            rf"tensor '{NAME}' has shape \(3, 2\), the config requires \(12, ",
        ),
        (lambda t: t[NAME][0].fill_(float("nan")), f"tensor '{NAME}' holds values that are not finite"),
    ],
)
def test_a_spoilt_checkpoint_is_refused_by_tensor(make_model, tmp_path, spoil, message):
    save(make_model(torch.float32), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    spoil(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def _edit(folder, change_tensors=None, **config):
    tensors = load_file(folder / "model.safetensors")
    if change_tensors:
        change_tensors(tensors)
    save_file(tensors, folder / "model.safetensors")
    hf = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(hf))


def test_mtp_layers_without_tensors_are_not_loaded(make_model, tmp_path):
    model = make_model(torch.float32)
    save(model, tmp_path)
    _edit(tmp_path, num_nextn_predict_layers=1)  # as transformers leaves it
    _assert_same(model, load(tmp_path))
    _edit(tmp_path, lambda tensors: tensors.update({"model.layers.3.eh_proj.weight": torch.zeros(24, 48)}))
    with pytest.raises(ValueError, match=r"'model\.layers\.3\.input_layernorm\.weight' is missing"):
        load(tmp_path)


def test_mtp_layers_store_shared_tensors_and_loading_them_is_optional(make_model, tmp_path):
    model = make_model(torch.float32, num_nextn_predict_layers=2)
    save(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for layer in (3, 4):
        assert torch.equal(stored[f"model.layers.{layer}.embed_tokens.weight"], model.model.embed_tokens.weight)
        assert torch.equal(stored[f"model.layers.{layer}.shared_head.head.weight"], model.lm_head.weight)
    _assert_same(model, load(tmp_path))
    served = load(tmp_path, mtp=False)
    assert served.config == model.config.without_mtp()
    ids = torch.randint(0, 50, (1, 5))
    assert torch.equal(served(ids).logits, model.eval()(ids).logits)
    _edit(tmp_path, lambda tensors: tensors["model.layers.4.embed_tokens.weight"].fill_(1.0))
    with pytest.raises(ValueError, match=r"'model\.layers\.4\.embed_tokens\.weight' differs from 'model\.embed_tokens"):
        load(tmp_path)


def test_a_cut_file_and_a_folder_without_a_model_are_refused(make_model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load(tmp_path)
    save(make_model(torch.float32), tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="not a safetensors file"):
        load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda pairs: pairs[:-1], "1 tensors are missing, the first 'model.layers.2.mlp.gate.e_score"),
        (lambda pairs: [*pairs, pairs[0]], "tensor 'model.embed_tokens.weight' is duplicate or not in the model"),
        (lambda pairs: [("model.embed_tokens.weight", torch.full((50, 24), float("inf")))], "not finite"),
    ],
)
def test_a_failed_write_leaves_no_model(make_model, tmp_path, spoil, message):
    model = make_model(torch.float32)
    save(model, tmp_path)
    with pytest.raises(ValueError, match=message):
        write_folder(tmp_path, model.config, spoil(list(_contents(model).items())), shard_bytes=20_000)
    assert not (tmp_path / "config.json").exists()
    assert not list(tmp_path.glob(".part-*"))


def test_a_write_reports_what_it_checked_with_few_files_open(make_model, tmp_path, monkeypatch):
    """V3 in FP32 has 1,343 shards, and a process may open 1,024 files."""
    monkeypatch.setattr(safetensors_folder, "_OPEN_FILES", 2)
    model = make_model(torch.float32)
    pairs = list(_contents(model).items())
    audit = write_folder(tmp_path / "fp8", model.config, pairs[::-1], "fp8", shard_bytes=2000)
    stored = stored_tensors(model.config, "fp8")
    assert len(list((tmp_path / "fp8").glob("model-*"))) > 10
    assert (audit.tensors, audit.values) == (len(stored), sum(math.prod(shape) for _, shape in stored.values()))
    checked = CheckedFolder(tmp_path / "fp8")
    assert len(list(checked.weights())) == len(pairs)
    assert checked.audit == audit
