"""The official FP8 format: its tensors, FP8 weights that stay FP8, and errors."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from moray.kernels.quantize import BLOCK, dequantize
from moray.models import checkpoint
from moray.models.cache import LatentCache
from moray.models.checkpoint import CheckedFolder, convert, load, save
from moray.models.tensors import is_quantized, parameter_shapes, scale_name

# Sizes above a block, and not multiples of one.
WIDE = {"hidden_size": 136, "intermediate_size": 150, "moe_intermediate_size": 130, "initializer_range": 0.05}


@pytest.fixture
def folder(make_model, tmp_path):
    model = make_model(torch.float32, num_nextn_predict_layers=1, **WIDE)
    save(model, tmp_path / "wide", "bf16")
    save(load(tmp_path / "wide"), tmp_path / "fp8", "fp8")
    return tmp_path


def test_the_layout_is_the_official_one(folder):
    stored = load_file(folder / "fp8" / "model.safetensors")
    wide = load_file(folder / "wide" / "model.safetensors")
    config = load(folder / "fp8").config
    hf = json.loads((folder / "fp8" / "config.json").read_text())
    assert hf["quantization_config"] == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    assert stored.keys() == wide.keys() | {scale_name(n) for n in parameter_shapes(config) if is_quantized(n)}
    for name, tensor in wide.items():
        if not is_quantized(name):
            assert torch.equal(stored[name], tensor), name
            continue
        scales = stored[scale_name(name)]
        assert stored[name].dtype == torch.float8_e4m3fn
        assert scales.dtype == torch.float32
        assert scales.shape == tuple(-(-size // 128) for size in tensor.shape)
        back = dequantize(stored[name], scales, (BLOCK, BLOCK))
        # Half a step of E4M3's three bits, or half its smallest number.
        bound = torch.maximum(tensor.float().abs() / 16, scales.max() * 2.0**-10)
        assert ((back - tensor.float()).abs() <= bound).all(), name
    quantized = {
        name.split(".", 3)[-1].split("experts.")[-1].lstrip("0123456789.") for name in wide if is_quantized(name)
    }
    assert "mlp.gate.weight" not in quantized
    assert "eh_proj.weight" not in quantized
    assert "self_attn.kv_a_proj_with_mqa.weight" in quantized


@pytest.mark.parametrize("precision", ["wide", "fp8"])
def test_a_part_of_a_flattened_tensor_is_read_in_bands(folder, monkeypatch, precision):
    monkeypatch.setattr(checkpoint, "_CHUNK", 1000)  # bands of one block's rows
    whole = dict(load(folder / precision, dequantize=True).named_parameters())
    source = CheckedFolder(folder / precision)
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight", "model.norm.weight"):
        flat = whole[name].detach().flatten()
        for begin, end in ((0, len(flat)), (1, 2), (len(flat) // 3, len(flat) - 1), (len(flat), len(flat))):
            part = torch.full((end - begin,), float("nan"))
            source.read_flat(name, begin, part)
            assert torch.equal(part, flat[begin:end]), (name, begin, end)


def test_fp8_weights_are_copied_bit_for_bit(folder):
    model = load(folder / "fp8")
    assert model.shards()[0].w_up_EFD.dtype == torch.float8_e4m3fn
    save(model, folder / "again", "fp8")
    convert(folder / "fp8", folder / "converted", "fp8")
    for name in ("model.safetensors", "config.json"):
        original = (folder / "fp8" / name).read_bytes()
        assert (folder / "again" / name).read_bytes() == original
        assert (folder / "converted" / name).read_bytes() == original


def test_it_computes_the_same_as_its_dequantized_model(folder):
    ids = torch.randint(0, 50, (2, 9))
    stored, wide = load(folder / "fp8"), load(folder / "fp8", dequantize=True)
    assert wide.shards()[0].w_up_EFD.dtype == torch.float32
    assert torch.equal(stored(ids).logits, wide(ids).logits)
    caches = [LatentCache(model.config, blocks=3, block_size=4) for model in (stored, wide)]
    tables = torch.arange(3).expand(1, 3)
    logits = [
        model.forward_cached(ids[:1], torch.arange(9)[None], cache, tables)
        for model, cache in zip((stored, wide), caches, strict=True)
    ]
    assert torch.equal(*logits)
    convert(folder / "fp8", folder / "back", "float32")
    assert torch.equal(load(folder / "back")(ids).logits, wide(ids).logits)


def test_a_change_of_dtype_leaves_fp8_alone(folder):
    model, changed = load(folder / "fp8"), load(folder / "fp8").to(torch.bfloat16)
    ours = dict(model.logical_scales())
    assert changed.lm_head.weight.dtype == torch.bfloat16
    for (name, scales), (_, view, _) in zip(
        changed.logical_scales(), (p for p in changed.logical_parameters() if is_quantized(p.name)), strict=False
    ):
        assert scales.dtype == torch.float32
        assert torch.equal(scales, ours[name])
        assert view.dtype == torch.float8_e4m3fn
    assert changed(torch.zeros(1, 3, dtype=torch.int64)).logits.isfinite().all()


NAME = "model.layers.2.mlp.experts.5.up_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t[NAME].view(torch.uint8)[0, :2].fill_(0xFF), f"tensor '{NAME}' holds values that are not finite"),
        (lambda t: t.pop(scale_name(NAME)), f"tensor '{NAME}_scale_inv' is missing"),
        (lambda t: t[scale_name(NAME)].zero_(), f"tensor '{NAME}_scale_inv' holds scales that are not positive"),
        (lambda t: t.update({scale_name(NAME): torch.ones(1, 2)}), rf"'{NAME}_scale_inv' has shape \(1, 2\)"),
        (
            lambda t: t.update({NAME: t[NAME].bfloat16()}),
            f"tensor '{NAME}' has dtype BF16, the config requires F8_E4M3",
        ),
        (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].int()}), "'lm_head.weight' has dtype I32"),
    ],
)
def test_a_spoilt_fp8_checkpoint_is_refused_by_tensor(folder, spoil, message):
    path = folder / "fp8" / "model.safetensors"
    tensors = load_file(path)
    spoil(tensors)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=message):
        load(folder / "fp8")


@pytest.mark.parametrize(
    ("field", "value"), [("quant_method", "awq"), ("weight_block_size", [64, 64]), ("fmt", "e5m2")]
)
def test_another_quantisation_is_refused_by_field(folder, field, value):
    path = folder / "fp8" / "config.json"
    hf = json.loads(path.read_text())
    hf["quantization_config"][field] = value
    path.write_text(json.dumps(hf))
    with pytest.raises(ValueError, match=rf"quantization_config\.{field} = "):
        load(folder / "fp8")


def test_converted_folders_can_be_read(make_model, tmp_path):
    """FP32's largest numbers exceed BF16's range and become its largest number, within its precision."""
    model = make_model(torch.float32, **WIDE)
    largest = torch.finfo(torch.float32).max
    model.lm_head.weight.data[0, 0] = largest
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = -largest
    save(model, tmp_path / "wide")
    for precision in ("float32", "bf16", "fp8"):
        convert(tmp_path / "wide", tmp_path / precision, precision)
        for dtype in (torch.float32, torch.bfloat16):
            read = load(tmp_path / precision, dtype, dequantize=True)
            for weight in (read.lm_head.weight, read.model.layers[0].mlp.up_proj.weight):
                assert weight.isfinite().all()
                assert weight[0, 0].abs().item() == pytest.approx(largest, rel=0.004)
    with pytest.raises(ValueError, match=r"weight' holds values outside the range of torch\.float16"):
        load(tmp_path / "wide", torch.float16)
