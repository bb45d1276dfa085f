"""Imported models: copied bit for bit, or refused with the tensor's name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moray
from moray.models.model import DeepseekV3
from moray.models.presets import PRESETS
from moray.pipelines.pretrain.step import loss_curve
from moray.pipelines.tokenizer.bos import processor_bos
from moray.pipelines.tokenizer.train import (
    TokenizerConfig,
    hugging_face_config,
    load_tokenizer,
    special_ids,
    train_tokenizer,
)
from moray.platform import api
from moray.platform.core.errors import InputError, RecipeError
from moray.platform.core.events import read_events
from moray.platform.core.home import Home
from moray.platform.plan.recipe import parse_recipe
from moray.platform.run.runner import Runner
from tests.conftest import Flow
from tests.small_run import recipe_text

SMALL = dataclasses.replace(
    PRESETS["tiny"],
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    num_nextn_predict_layers=1,
)
TENSOR = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with its companion files and an unrelated file."""
    model = DeepseekV3(SMALL)
    model.init_weights(4)
    folder = tmp_path / "Some Model"
    moray.models.save(model, folder, "bf16")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "LICENSE").write_text("Apache-2.0")
    (folder / "modeling_deepseek.py").write_text("raise SystemExit")
    return folder


def test_a_model_is_imported_bit_for_bit_and_only_once(folder: Path, home: Home) -> None:
    alias, artifact = api.import_model(folder, home=home)
    assert alias == "some-model@newest"
    assert api.model_folder(alias, home) == api.model_folder("some-model", home) == artifact.folder
    assert api.model_name("some-model", artifact.folder) == api.model_name(alias, artifact.folder) == "some-model"
    assert api.model_name(str(folder), folder) == "Some Model"
    kept = {path.name for path in artifact.folder.iterdir()} - {"manifest.json"}
    assert kept == {"config.json", "model.safetensors", "tokenizer.json", "LICENSE"}
    for name in kept:
        assert (artifact.folder / name).read_bytes() == (folder / name).read_bytes()
    assert artifact.manifest.counts["out:parameters"] == sum(p.numel() for p in moray.models.load(folder).parameters())
    stored = load_file(folder / "model.safetensors")
    checked = artifact.manifest.counts["checked_tensors"], artifact.manifest.counts["checked_values"]
    assert checked == (len(stored), sum(tensor.numel() for tensor in stored.values()))
    assert f"; {len(stored)} tensors, {checked[1]:,.0f} values checked: all finite" in artifact.manifest.outcome
    again, same = api.import_model(folder.rename(folder.with_name("moved")), "other", home=home)
    assert (again, same.reference) == ("other@newest", artifact.reference)


def test_only_checked_files_are_copied(folder: Path, home: Home) -> None:
    """Files in sub-folders keep their paths, other weights are not copied, code is copied if a config uses it."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "parts").mkdir()
    names = sorted(tensors)
    files = {"parts/one.safetensors": names[:9], "two.safetensors": names[9:]}
    for file, keep in files.items():
        save_file({name: tensors[name] for name in keep}, folder / file)
    index = {"weight_map": {name: file for file, keep in files.items() for name in keep}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"x": torch.full((2,), float("nan"))}, folder / "consolidated.safetensors")
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    _, artifact = api.import_model(folder, home=home)
    kept = {str(p.relative_to(artifact.folder)) for p in artifact.folder.rglob("*") if p.is_file()} - {"manifest.json"}
    companions = {"tokenizer.json", "LICENSE", "modeling_deepseek.py"}
    assert kept == {"config.json", "model.safetensors.index.json", *files, *companions}
    moray.models.load(artifact.folder)
    _, converted = api.import_model(folder, "wide", "float32", home=home)
    assert not list(converted.folder.glob("*.py")), "its config.json names no code"


def test_weights_outside_of_the_folder_are_refused(folder: Path, home: Home) -> None:
    (folder / "model.safetensors").rename(folder.parent / "x.safetensors")
    index = {"weight_map": {TENSOR: "../x.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"into '\.\./x\.safetensors', which is not a file of the folder"):
        api.import_model(folder, home=home)
    assert not list(home.aliases.glob("*"))


def test_a_model_can_be_converted(folder: Path, home: Home) -> None:
    _, artifact = api.import_model(folder, precision="fp8", home=home)
    model = moray.models.load(artifact.folder)
    assert model.shards()[0].w_up_EFD.dtype == torch.float8_e4m3fn
    assert (artifact.folder / "tokenizer.json").exists()
    assert "active), fp8; " in artifact.manifest.outcome


def test_a_model_gets_a_chat_template_and_shares_its_weights(folder: Path, home: Home, tmp_path: Path) -> None:
    (folder / "chat_template.jinja").write_text("old")
    alias, before = api.import_model(folder, home=home)
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0].content }}")
    again, after = api.give_chat_template(alias, template, home=home)
    assert (again, api.chat_template(alias, home=home)) == (alias, template.read_text())
    assert api.chat_template(before.reference, home=home) == "old"
    assert (after.folder / "model.safetensors").samefile(before.folder / "model.safetensors")
    assert not (after.folder / "config.json").samefile(before.folder / "config.json")
    plain, _ = api.give_chat_template(str(folder), "plain", "talker", home=home)
    assert "Assistant:" in (api.chat_template(plain, home=home) or "")
    assert (folder / "chat_template.jinja").read_text() == "old"


@pytest.mark.parametrize(("source", "says"), [(None, "No such file"), ("{% if %}", "line 1"), (b"\xff", "decode")])
def test_a_chat_template_that_cannot_be_used(
    folder: Path, home: Home, tmp_path: Path, source: str | bytes | None, says: str
) -> None:
    template = tmp_path / "template.jinja"
    if source is not None:
        template.write_bytes(source if isinstance(source, bytes) else source.encode())
    with pytest.raises(InputError, match=says):
        api.give_chat_template(str(folder), template, home=home)
    assert not list(home.aliases.glob("*"))


def test_a_corrupt_model_is_refused_by_tensor_and_nothing_is_kept(folder: Path, home: Home) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[TENSOR][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=f"'{TENSOR}' holds values that are not finite"):
        api.import_model(folder, home=home)
    assert not list(home.aliases.glob("*"))
    assert not list(home.artifacts.glob("import-model/*/manifest.json"))


def test_a_folder_without_a_model_is_refused_before_anything_starts(folder: Path, tmp_path: Path, home: Home) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        api.import_model(tmp_path / "nowhere", home=home)
    with pytest.raises(InputError, match=r"contains no config\.json"):
        api.import_model(tmp_path, home=home)
    with pytest.raises(InputError, match="model name 'A B' may contain only"):
        api.import_model(folder, "A B", home=home)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(InputError, match="model_type = 'llama'"):
        api.import_model(folder, home=home)


def test_a_tokenizer_names_its_special_tokens_in_either_form(flow_tokenizer: Path) -> None:
    expected = {"bos": 0, "eos": 1, "pad": 2}
    assert special_ids(flow_tokenizer) == expected
    path = flow_tokenizer / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["bos_token"] = {"content": config["bos_token"], "lstrip": False}
    del config["pad_token"]
    path.write_text(json.dumps(config))
    assert special_ids(flow_tokenizer) == expected, "a token that is called pad"
    path.write_text(json.dumps({**config, "pad_token": config["eos_token"]}))
    assert special_ids(flow_tokenizer) == expected, "padding is never an end"
    path.write_text(json.dumps({**config, "eos_token": config["bos_token"]}))
    with pytest.raises(InputError, match="bos_token and eos_token are the same token, 0"):
        special_ids(flow_tokenizer)
    config["eos_token"] = "<unheard of>"
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match="has no eos_token that is in the vocabulary"):
        special_ids(flow_tokenizer)


@pytest.fixture
def flow_tokenizer(tmp_path: Path) -> Path:
    from moray.pipelines.tokenizer.train import TokenizerConfig, hugging_face_config, train_tokenizer

    train_tokenizer(iter(["some words, some more words"]), TokenizerConfig(vocab_size=300)).save(
        str(tmp_path / "tokenizer.json")
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(hugging_face_config()))
    return tmp_path


CONTINUED = """
  import: {{uses: import-model, with: {{path: "{model}"}}}}
  own: {{uses: model-tokenizer, inputs: {{model: import}}}}
  tokenize: {{inputs: {{documents: split, tokenizer: own}}, with: {{sequence_length: 64}}}}
  pretrain:
    inputs: {{tokens: tokenize, model: import}}
    with:
      {{steps: 3, batch_sequences: 8, schedule: {{peak: 1.0e-4}}, parallel: {{recompute: v3}}, precision: fp8,
       optimizer: {{moments: fp8}}{more}}}
  export: {{inputs: {{checkpoint: pretrain, tokenizer: own}}, with: {{precision: fp8}}}}
  evaluate: {{inputs: {{model: export, tokens: tokenize, documents: split}}}}
"""


def test_training_continues_from_an_imported_model(flow: Flow) -> None:
    def recipe(more: str = ""):
        model = flow.artifact("export").folder
        text = recipe_text(flow.folder, "split") + CONTINUED.format(model=model, more=more)
        return parse_recipe(text, Path("continued.yaml"))

    with pytest.raises(RecipeError, match=r"model\.preset conflicts with the input `model`"):
        recipe(", model: {preset: tiny}")
    with pytest.raises(InputError, match="the overrides change tensor shapes of the input model"):
        Runner(flow.home, flow.cluster, []).run(recipe(", model: {hidden_size: 128}"))
    # A longer context is no other tensor.
    scaling = (
        ", model: {max_position_embeddings: 4096, rope_scaling: {factor: 2, original_max_position_embeddings: 2048}}"
    )
    done = Runner(flow.home, flow.cluster, []).run(recipe(scaling))
    before = loss_curve(read_events(flow.result.folder), "pretrain")
    after = loss_curve(read_events(done.folder), "pretrain")
    assert after[0][1] < before[0][1] - 0.5  # not from the start
    exported = done.steps["export"].artifact.folder
    hf = json.loads((exported / "config.json").read_text())
    assert hf["quantization_config"]["quant_method"] == "fp8"
    assert hf["rope_scaling"]["factor"] == 2
    assert "bits/byte" in done.steps["evaluate"].artifact.manifest.outcome


def tokenizer_files(folder: Path, **said: object) -> None:
    made = train_tokenizer(iter(["In the beginning was the word. " * 9]), TokenizerConfig(vocab_size=300))
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**hugging_face_config(), **said}))


def test_inconsistent_bos_settings_are_made_consistent(folder: Path, home: Home) -> None:
    tokenizer_files(folder, add_bos_token=True)
    notes: list[str] = []
    _, artifact = api.import_model(folder, home=home, listeners=[lambda e: notes.append(getattr(e, "text", ""))])
    assert processor_bos(load_tokenizer(artifact.folder), 0) == 0
    assert any("to put bos before a text, as tokenizer_config.json does" in note for note in notes)


@pytest.mark.parametrize("said", [{"bos_token": "<|nobody|>"}, {"bos_token": "<|pad|>"}, {"bos_token": None}])
def test_a_bos_that_the_config_does_not_confirm_leaves_the_files_alone(
    folder: Path, home: Home, said: dict[str, object]
) -> None:
    tokenizer_files(folder, add_bos_token=True, **said)
    notes: list[str] = []
    _, artifact = api.import_model(folder, home=home, listeners=[lambda e: notes.append(getattr(e, "text", ""))])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (artifact.folder / name).read_bytes() == (folder / name).read_bytes()
    assert any("left unchanged" in note for note in notes)


@pytest.mark.parametrize("content", ["[]", "{", '"x"'])
def test_an_invalid_config_is_an_error_without_a_traceback(folder: Path, home: Home, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json"):
        api.import_model(folder, home=home)
