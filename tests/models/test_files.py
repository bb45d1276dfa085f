"""The files of a folder that hold the model: transformers' choice, or an error with the file's name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moray
from moray.models.files import INDEX, SINGLE, model_files, weight_files
from moray.models.model import DeepseekV3


@pytest.fixture
def folder(config, tmp_path: Path) -> Path:
    model = DeepseekV3(config)
    model.init_weights(1)
    moray.models.save(model, tmp_path / "model")
    return tmp_path / "model"


def split(folder: Path, first: str, second: str, also: dict[str, torch.Tensor] | None = None) -> dict[str, str]:
    """The model in two files and an index; `also` goes into the second file on top. Returns the index's map."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names = sorted(tensors)
    parts = {first: names[: len(names) // 2], second: names[len(names) // 2 :]}
    for file, keep in parts.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensors[name] for name in keep} | (also or {} if file == second else {}), folder / file)
    found = {name: file for file, keep in parts.items() for name in keep}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": found}))
    return found


def test_files_in_a_sub_folder_are_part_of_the_model(folder: Path) -> None:
    before = moray.models.load(folder).state_dict()
    split(folder, "weights/a.safetensors", "b.safetensors")
    assert model_files(folder) == ["config.json", INDEX, "b.safetensors", "weights/a.safetensors"]
    after = moray.models.load(folder).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/tmp/x.safetensors", "a/../../x", "..\\x", "", 5, None])
def test_a_path_out_of_the_folder_is_refused(folder: Path, name: object) -> None:
    found = split(folder, "a.safetensors", "b.safetensors")
    tensor = min(found)
    (folder / INDEX).write_text(json.dumps({"weight_map": {**found, tensor: name}}))
    with pytest.raises(ValueError, match=f"puts tensor '{tensor}' into .* which is not a file of the folder"):
        moray.models.load(folder)


def test_beside_a_stale_index_the_single_file_is_the_model(folder: Path) -> None:
    """transformers' save_pretrained leaves the index of an earlier save; it reads the single file then."""
    tensors = load_file(folder / SINGLE)
    split(folder, "a.safetensors", "b.safetensors")
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, folder / SINGLE)
    assert weight_files(folder) == [SINGLE]
    assert torch.equal(moray.models.load(folder).lm_head.weight, tensors["lm_head.weight"] * 2)
    (folder / "a.safetensors").unlink()
    assert torch.equal(moray.models.load(folder).lm_head.weight, tensors["lm_head.weight"] * 2)


def test_a_tensor_in_two_files_is_refused_by_name(folder: Path) -> None:
    stale = {"lm_head.weight": torch.zeros_like(load_file(folder / SINGLE)["lm_head.weight"])}
    split(folder, "a.safetensors", "b.safetensors", also=stale)
    with pytest.raises(ValueError, match=r"tensor 'lm_head.weight' is in two files, .*a.safetensors and .*b.safetens"):
        moray.models.load(folder)


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"weight_map": {}}', '{"weight_map": []}', "null", "{", "[" * 100_000]
)
def test_an_index_of_another_shape_is_refused_by_name(folder: Path, content: str, single: bool) -> None:
    if not single:
        split(folder, "a.safetensors", "b.safetensors")
    (folder / INDEX).write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        moray.models.load(folder)


@pytest.mark.parametrize("content", ["[]", '"text"', "null", "{,", "[" * 100_000])
def test_a_config_of_another_kind_is_refused_by_name(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        moray.models.load(folder)


@pytest.mark.parametrize(
    "change",
    [{"quantization_config": [1]}, {"quantization_config": "fp8"}, {"rope_scaling": "yarn"}, {"rope_scaling": [1]}],
)
def test_a_field_of_another_kind_is_refused_by_name(folder: Path, change: dict[str, object]) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=f"{next(iter(change))} = .* must be an object"):
        moray.models.load(folder)
