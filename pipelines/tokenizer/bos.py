"""The bos settings of a model folder's tokenizer files: reading them, and making them consistent.

A prompt must start with bos, like the documents in training. There are two settings: transformers and vLLM use
`post_processor` of tokenizer.json, and llama.cpp uses `add_bos_token` of tokenizer_config.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moray.models.files import read_object
from moray.platform.core.atomic import write_text

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"


def processor_bos(tokenizer: Any, bos: int | None) -> int | None:
    """The bos that the post-processor of a `tokenizers.Tokenizer` puts before a text; None if it adds nothing.

    bos: the model's. Raises ValueError for a post-processor that adds other tokens before the text, or any after it,
    because the model could not continue such a prompt.
    """
    plain, full = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    front = full[: len(full) - len(plain)]
    if front + plain != full or len(front) > 1 or (front and bos not in (None, front[0])):
        raise ValueError(
            f"tokenizer.json: unsupported post_processor: it turns {plain} into {full}, and the model's bos is {bos}"
        )
    return front[0] if front else None


def adds_bos_token(folder: Path) -> bool | None:
    """`add_bos_token` of tokenizer_config.json; None if it is not set. Raises ValueError for invalid JSON."""
    value = read_object_or_empty(folder / CONFIG).get("add_bos_token")
    return value if isinstance(value, bool) else None


def named_token(folder: Path, kind: str, tokenizer: Any) -> int | None:
    """The id of `bos_token`, `eos_token` or `pad_token` of tokenizer_config.json; None if that is not set or not in the
    vocabulary. Raises ValueError for invalid JSON."""
    token = read_object_or_empty(folder / CONFIG).get(f"{kind}_token")
    name = token.get("content") if isinstance(token, dict) else token
    index: int | None = tokenizer.token_to_id(name) if isinstance(name, str) else None
    return index


def write_with_bos(source: Path, target: Path, bos: str, bos_id: int) -> None:
    """Writes the tokenizer files of `source` to `target`, changed so that every reader puts `bos` before a text and
    nothing after it."""
    tokenizer = read_object_or_empty(source / TOKENIZER)
    kept = [part for part in _parts(tokenizer.get("post_processor")) if part.get("type") == "ByteLevel"]
    first, one, two = {"SpecialToken": {"id": bos, "type_id": 0}}, _sequence("A", 0), _sequence("B", 1)
    template = {
        "type": "TemplateProcessing",
        "single": [first, one],
        "pair": [first, one, two],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }
    processor = {"type": "Sequence", "processors": [*kept, template]} if kept else template
    _write(target / TOKENIZER, {**tokenizer, "post_processor": processor})
    settings = {"bos_token": bos, "add_bos_token": True, "add_eos_token": False}
    _write(target / CONFIG, {**read_object_or_empty(source / CONFIG), **settings})


def read_object_or_empty(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if the file does not exist. Raises ValueError naming the file."""
    return read_object(path) if path.is_file() else {}


def _parts(processor: dict[str, Any] | None) -> list[dict[str, Any]]:
    if not processor:
        return []
    return processor["processors"] if processor.get("type") == "Sequence" else [processor]


def _sequence(name: str, kind: int) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": kind}}


def _write(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON without sorting keys, because a vocabulary is ordered by id."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
