"""Existing tokenizers: copied unchanged, or refused with a reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import models, trainers

from moray.pipelines.tokenizer.encoders import encoder
from moray.pipelines.tokenizer.load import step
from moray.pipelines.tokenizer.train import (
    TokenizerConfig,
    hugging_face_config,
    load_tokenizer,
    special_ids,
    train_tokenizer,
)
from moray.platform.core.errors import InputError
from moray.platform.core.events import NoteEvent, read_events
from moray.platform.core.home import Home
from moray.platform.plan.context import StepContext
from tests.step_contexts import context_for


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "theirs"
    folder.mkdir()
    train_tokenizer(iter(["some words, some more words"]), TokenizerConfig(vocab_size=300)).save(
        str(folder / "tokenizer.json")
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(hugging_face_config()))
    return folder


def load(tmp_path: Path, **settings: Any) -> StepContext[Any]:
    (tmp_path / "out").mkdir(exist_ok=True)
    context = context_for(
        "load-tokenizer",
        step.Config.model_validate(settings),
        {},
        tmp_path / "out",
        Home(tmp_path / "home"),
        tmp_path / "run",
    )
    step.run(context)
    return context


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def notes(context: StepContext[Any]) -> list[str]:
    return [event.text for event in read_events(context.run) if isinstance(event, NoteEvent)]


def test_a_folder_or_its_file_is_copied_unchanged(tmp_path: Path, folder: Path) -> None:
    for path in (folder, folder / "tokenizer.json"):
        context = load(tmp_path, path=path)
        assert (context.folder / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
        assert special_ids(context.folder) == {"bos": 0, "eos": 1, "pad": 2}
        assert context.counts == {"out:tokens": load_tokenizer(folder).get_vocab_size()}
        assert notes(context) == []
        files = step.external(context.config)
        assert [file.key for file in files] == ["tokenizer.json", "tokenizer_config.json"]


def test_the_recipe_can_set_tokens_that_no_file_defines(tmp_path: Path, folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match=r"load-tokenizer\.bos: .* does not define it") as found:
        load(tmp_path, path=folder)
    assert found.value.hint == "set it to one of <|bos|>, <|eos|>, <|pad|>"
    with pytest.raises(InputError, match=r"load-tokenizer\.eos: '<\|oes\|>' is not in the vocabulary") as found:
        load(tmp_path, path=folder, bos="<|bos|>", eos="<|oes|>")
    assert found.value.hint == "did you mean '<|eos|>'?"
    context = load(tmp_path, path=folder, bos="<|eos|>", eos="<|bos|>")
    assert special_ids(context.folder) == {"bos": 1, "eos": 0, "pad": 2}


def test_invalid_tokenizers_are_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        load(tmp_path, path=tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"contains no tokenizer\.json"):
        load(tmp_path, path=tmp_path)
    with pytest.raises(InputError, match="package 'no_such_package' is not installed"):
        load(tmp_path, package="no_such_package")
    with pytest.raises(InputError, match=r"pyarrow contains no tokenizer\.json"):
        load(tmp_path, package="pyarrow")
    with pytest.raises(ValueError, match="set either `path` or `package`"):
        load(tmp_path)
    for content in (
        "[]",
        "null",
        '{"bos_token": {}}',
        '{"bos_token": 5}',
        '{"bos_token": ["a"], "eos_token": "<|eos|>"}',
    ):
        (folder / "tokenizer_config.json").write_text(content)
        with pytest.raises(InputError, match=r"tokenizer_config\.json|does not define it"):
            load(tmp_path, path=folder)
    (folder / "tokenizer_config.json").write_text("{torn")
    with pytest.raises(InputError, match=r"tokenizer_config\.json is not a JSON"):
        load(tmp_path, path=folder)
    for content in ("{torn", "[]", '{"model": {"type": "Magic"}}'):
        (folder / "tokenizer.json").write_text(content)
        with pytest.raises(InputError, match=r"tokenizer\.json: invalid tokenizer"):
            load(tmp_path, path=folder)


def test_a_tokenizer_with_dropout_is_refused(tmp_path: Path, folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    change(folder / "tokenizer.json", model={**model, "dropout": 0.1})
    with pytest.raises(InputError, match=r"BPE dropout is not supported \(dropout 0\.1\)"):
        load(tmp_path, path=folder)


def test_a_lossy_or_slow_tokenizer_is_a_warning(tmp_path: Path, folder: Path) -> None:
    change(folder / "tokenizer.json", normalizer={"type": "Lowercase"})
    lossy, slow = notes(load(tmp_path, path=folder))
    assert lossy.startswith("this tokenizer is not lossless: it decodes ' Two words")
    assert "to ' two words" in lossy
    assert slow.startswith("Hugging Face tokenizers, which is slower, will encode text: gigatoken does not support")


def test_truncation_and_padding_are_ignored(tmp_path: Path, folder: Path) -> None:
    """Also in the check of lossless decoding and in coverage's token counts."""
    from moray.pipelines.coverage.measure import _tokens

    text = "some words " * 400
    whole = len(load_tokenizer(folder).encode(text).ids)
    change(
        folder / "tokenizer.json",
        truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 9},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 2,
            "pad_type_id": 0,
            "pad_token": "<|pad|>",
        },
    )
    context = load(tmp_path, path=folder)
    assert notes(context) == []
    assert len(load_tokenizer(context.folder).encode(text).ids) == whole
    assert _tokens([text, "some"], context.folder)[0] == whole


@pytest.mark.parametrize("byte_fallback", [False, True])
def test_the_unknown_token_is_not_used_for_padding(tmp_path: Path, folder: Path, byte_fallback: bool) -> None:
    """If a vocabulary has every byte, the unknown token is free for padding."""
    special = ["<unk>", "<s>", "</s>"]
    model = models.BPE(unk_token="<unk>", byte_fallback=byte_fallback)
    made = HuggingFaceTokenizer(model)
    made.train_from_iterator(
        ["words of few letters"],
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256) if byte_fallback)],
            show_progress=False,
        ),
    )
    made.save(str(folder / "tokenizer.json"))
    for named in ({}, {"pad_token": "<unk>"}, {"unk_token": "<unk>"}):
        config = {"bos_token": "<s>", "eos_token": "</s>", **named}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        context = load(tmp_path, path=folder)
        pad = special_ids(context.folder)["pad"]
        text = encoder("reference", context.folder).encode(
            pa.array(["\u4e2d\u6587 \U0001f600 and <unk> <|pad|> words"])
        )
        assert pad not in text.ids.tolist()
        size = made.get_vocab_size()
        assert context.counts == {"out:tokens": size if byte_fallback else size + 1}
        assert any("added the padding token '<|pad|>'" in note for note in notes(context)) == (not byte_fallback)
        encoder.cache_clear()
        shutil.rmtree(context.run)


def test_a_package_is_found_by_its_name(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "some_tokenizer"
    (tmp_path / "site").mkdir()
    folder.rename(package)
    (package / "__init__.py").write_text("raise SystemExit('a package is looked into, not run')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    context = load(tmp_path, package="some_tokenizer")
    assert special_ids(context.folder) == {"bos": 0, "eos": 1, "pad": 2}
