"""The body of `POST /v1/completions`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from moray.pipelines.serve.api_error import ApiError
from moray.pipelines.serve.detokenizer import ServingVocabulary
from moray.pipelines.serve.protocol import MOST_ANSWERS, AnswerFields, field_error
from moray.pipelines.serve.sequence import Request

MOST_PROMPTS = 128
MOST_LOGPROBS = 5

Prompt = str | tuple[int, ...]


class CompletionRequest(AnswerFields):
    """The body of `POST /v1/completions`. `prompt` is normalised to a tuple of prompts."""

    # Of OpenAI's API and then of vLLM's and SGLang's extensions. `True` is neutral for add_special_tokens and
    # skip_special_tokens, because prompts get a bos and special tokens have no text.
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "best_of": (1,),
        "suffix": ("",),
        "bad_words": ([],),
        "length_penalty": (1,),
        "use_beam_search": (False,),
        "add_special_tokens": (True,),
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True,),
        "include_stop_str_in_output": (False,),
        "return_token_ids": (False,),
    }
    refused: ClassVar[Mapping[str, str]] = {
        "messages": "belongs to /v1/chat/completions; this route continues a prompt",
    }

    prompt: tuple[Prompt, ...]
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: bool = False

    @field_validator("prompt", mode="plain", json_schema_input_type=str | list[str] | list[int] | list[list[int]])
    @classmethod
    def _prompts(cls, value: Any) -> tuple[Prompt, ...]:
        return as_prompts(value)

    @model_validator(mode="after")
    def _limits(self) -> Self:
        if self.n * len(self.prompt) > MOST_ANSWERS:
            raise field_error("n", f"n times prompts may be up to {MOST_ANSWERS}")
        if self.min_tokens > self.max_tokens:
            raise field_error("min_tokens", "must not exceed max_tokens")
        return self

    def prompts(self, vocabulary: ServingVocabulary) -> list[Request]:
        """An engine request for each prompt. Raises ApiError for text that cannot be encoded.

        A text prompt gets a bos if the model's tokenizer adds one. A prompt of ids gets a bos unless the tokenizer's
        files disable it.
        """
        return [self._request(prompt, vocabulary) for prompt in self.prompt]

    def _request(self, prompt: Prompt, vocabulary: ServingVocabulary) -> Request:
        return Request(
            max_tokens=self.max_tokens,
            logprobs=self.logprobs,
            echo=self.echo,
            **prompt_fields(prompt, vocabulary, "prompt"),
            **self.sampling(vocabulary),
        )


def as_prompts(value: Any) -> tuple[Prompt, ...]:
    """One or several prompts, each a text or a list of ids. Raises a pydantic error."""
    prompts = value if isinstance(value, list) and not are_ids(value) else [value]
    found = tuple(tuple(p) if isinstance(p, list) and are_ids(p) else p for p in prompts)
    if not found or not all(isinstance(prompt, str | tuple) for prompt in found):
        raise PydanticCustomError(
            "prompt", "must be a string, a list of strings, a list of token ids or a list of such lists, not empty"
        )
    if len(found) > MOST_PROMPTS:
        raise PydanticCustomError("prompt", f"may have up to {MOST_PROMPTS} prompts; send several requests")
    return found


def prompt_fields(prompt: Prompt, vocabulary: ServingVocabulary, field: str) -> dict[str, Any]:
    """The fields of the engine's request for a prompt. Raises ApiError for text that cannot be encoded."""
    if isinstance(prompt, str):
        return {"prompt": encode_text(prompt, vocabulary, field), "bare": not vocabulary.adds_bos}
    return {"prompt": prompt, "bare": vocabulary.adds_bos is False}


def are_ids(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(index, int) and not isinstance(index, bool) for index in value)


def encode_text(text: str, vocabulary: ServingVocabulary, field: str = "prompt") -> tuple[int, ...]:
    """Raises ApiError for text that cannot be encoded."""
    try:
        return tuple(vocabulary.encode(text))
    except ValueError as error:
        raise ApiError(400, f"{field}: {error}", field) from error
