"""What a model folder's tokenizer files say of the start of a text, and files that say the same to every reader.

A prompt begins as training's documents did, with a bos. Readers look for that in two places: transformers and vLLM let
`post_processor` of tokenizer.json put it in front, llama.cpp asks `add_bos_token` of tokenizer_config.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moray.models.files import read_object
from moray.platform.core.atomic import write_text

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"


def processor_bos(tokenizer: Any, bos: int | None) -> int | None:
    """The bos that the post-processor of a `tokenizers.Tokenizer` puts before a text; None if it puts nothing there.

    bos: the model's. Raises ValueError for a post-processor that puts other tokens there, or some behind the text,
    after which it would not go on.
    """
    plain, full = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    front = full[: len(full) - len(plain)]
    if front + plain != full or len(front) > 1 or (front and bos not in (None, front[0])):
        raise ValueError(f"tokenizer.json: post_processor makes {full} of a text of {plain}; the model's bos is {bos}")
    return front[0] if front else None


def says_bos(folder: Path) -> bool | None:
    """`add_bos_token` of tokenizer_config.json; None where it says nothing. Raises ValueError for what is no JSON."""
    said = read_if_there(folder / CONFIG).get("add_bos_token")
    return said if isinstance(said, bool) else None


def named_token(folder: Path, kind: str, tokenizer: Any) -> int | None:
    """The id of `bos_token`, `eos_token` or `pad_token` of tokenizer_config.json; None if it names no token of the
    vocabulary. Raises ValueError for what is no JSON."""
    token = read_if_there(folder / CONFIG).get(f"{kind}_token")
    name = token.get("content") if isinstance(token, dict) else token
    index: int | None = tokenizer.token_to_id(name) if isinstance(name, str) else None
    return index


def write_with_bos(source: Path, target: Path, bos: str, bos_id: int) -> None:
    """Writes the tokenizer files of `source` to `target` so that every reader puts `bos` before a text, and nothing
    behind it."""
    tokenizer = read_if_there(source / TOKENIZER)
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
    said = {"bos_token": bos, "add_bos_token": True, "add_eos_token": False}
    _write(target / CONFIG, {**read_if_there(source / CONFIG), **said})


def read_if_there(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object; empty where there is none. Raises ValueError naming it."""
    return read_object(path) if path.is_file() else {}


def _parts(processor: dict[str, Any] | None) -> list[dict[str, Any]]:
    if not processor:
        return []
    return processor["processors"] if processor.get("type") == "Sequence" else [processor]


def _sequence(name: str, kind: int) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": kind}}


def _write(path: Path, content: dict[str, Any]) -> None:
    """Not sorted: the order of a vocabulary is that of its ids."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
