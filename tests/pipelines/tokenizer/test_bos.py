"""Every reader of a model folder puts the same ids before a text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from moray.pipelines.serve.completion_request import CompletionRequest
from moray.pipelines.serve.detokenizer import ServingVocabulary
from moray.pipelines.tokenizer.bos import adds_bos_token, processor_bos, write_with_bos
from moray.pipelines.tokenizer.train import TokenizerConfig, hugging_face_config, load_tokenizer, train_tokenizer

TEXTS = ["In the beginning", " two  spaces\n\n", "naïve 你好 🙂", "", "\x00"]
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    return json.loads(
        train_tokenizer(iter(["In the beginning was the word. " * 9]), TokenizerConfig(vocab_size=300)).to_str()
    )


def write(folder: Path, content: dict[str, Any], **said: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps(hugging_face_config() | {"add_bos_token": None} | said))
    return folder


def served(folder: Path) -> list[list[int]]:
    """The ids that the engine reads for a text: bos, unless bare, and the prompt."""
    vocabulary = ServingVocabulary.load(folder, 0, 1)
    requests = CompletionRequest(prompt=TEXTS).prompts(vocabulary)
    return [[*(() if request.bare else (vocabulary.bos,)), *request.prompt] for request in requests]


def read(folder: Path) -> list[list[int]]:
    transformers = pytest.importorskip("transformers")
    auto = transformers.AutoTokenizer.from_pretrained(str(folder))
    return [auto(text).input_ids for text in TEXTS]


@pytest.mark.parametrize("processor", [None, BYTES, {"type": "Sequence", "processors": [BYTES]}])
def test_written_files_start_texts_with_bos_for_all_readers(
    tmp_path: Path, content: dict[str, Any], processor: dict[str, Any] | None
) -> None:
    source = write(tmp_path / "source", {**content, "post_processor": processor}, add_eos_token=True)
    write_with_bos(source, tmp_path, "<|bos|>", 0)
    assert served(tmp_path) == read(tmp_path)
    assert all(ids[0] == 0 and ids.count(0) == 1 for ids in read(tmp_path))
    said = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (said["add_bos_token"], said["add_eos_token"]) == (True, False)  # what llama.cpp goes by
    assert load_tokenizer(tmp_path).get_vocab() == load_tokenizer(source).get_vocab()
    before = (tmp_path / "tokenizer.json").read_bytes()
    write_with_bos(tmp_path, tmp_path, "<|bos|>", 0)
    assert (tmp_path / "tokenizer.json").read_bytes() == before, "again: the same"


@pytest.mark.parametrize("said", [None, False])
def test_a_tokenizer_without_bos_is_served_without(tmp_path: Path, content: dict[str, Any], said: bool | None) -> None:
    write(tmp_path, content, add_bos_token=said)
    assert adds_bos_token(tmp_path) is said
    assert served(tmp_path) == read(tmp_path)
    request = CompletionRequest(prompt=[5, 6]).prompts(ServingVocabulary.load(tmp_path, 0, 1))[0]
    assert request.bare is (said is False), "ids get a bos unless the tokenizer says that it gives none"


def test_an_unsupported_post_processor_is_refused(tmp_path: Path, content: dict[str, Any]) -> None:
    source = write(tmp_path / "source", content)
    write_with_bos(source, tmp_path, "<|bos|>", 0)
    changed = json.loads((tmp_path / "tokenizer.json").read_text())
    assert ServingVocabulary.load(tmp_path, 5, 1).bos == 0, "5 is a default, of which config.json says nothing"
    (tmp_path / "config.json").write_text('{"bos_token_id": 5}')
    with pytest.raises(ValueError, match="the model's bos is 5"):
        ServingVocabulary.load(tmp_path, 5, 1)
    assert processor_bos(load_tokenizer(tmp_path), None) == 0
    changed["post_processor"]["single"].reverse()
    write(tmp_path, changed)
    with pytest.raises(ValueError, match="unsupported post_processor"):
        ServingVocabulary.load(tmp_path, 0, 1)


@pytest.mark.parametrize(
    ("normalizer", "factor"),
    [
        (None, 1.0), ({"type": "Sequence", "normalizers": []}, 1.0), ({"type": "NFC"}, 4.0),
        ({"type": "Sequence", "normalizers": [{"type": "NFKC"}]}, 4.0), ({"type": "StripAccents"}, math.inf),
    ],
)  # fmt: skip
def test_how_much_shorter_a_normalizer_makes_a_text(
    tmp_path: Path, content: dict[str, Any], normalizer: dict[str, Any] | None, factor: float
) -> None:
    """An empty sequence, which published tokenizers have, is no normalizer."""
    write(tmp_path, {**content, "normalizer": normalizer})
    assert ServingVocabulary.load(tmp_path, 0, 1).shrinks == factor
