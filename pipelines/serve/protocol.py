"""The wire format: the body of `POST /v1/completions`, and error objects as in OpenAI's API.

Notable: no field is silently dropped. Unknown fields are refused by name. So are known fields that this server does not
support, of OpenAI's API and of other servers' extensions, unless they have their neutral value. Fields that do not
affect the answer (`user`, `metadata`) are ignored. Types are strict, as in OpenAI's API: "5" is not a number. `null`
means the default.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from moray.pipelines.serve.api_error import ALIAS, ApiError
from moray.pipelines.serve.detokenizer import ServingVocabulary
from moray.pipelines.serve.sequence import SEEDS, Request

MOST_PROMPTS = 128
MOST_CHOICES = 128
MOST_ANSWERS = 256  # prompts times choices
MOST_BIASES = 300
MOST_STOP_IDS = 64
MOST_STOPS = 4
LONGEST_STOP = 1024  # characters, because every token searches the answer for it
MOST_LOGPROBS = 5
_LONGEST_ID = 10  # digits
_SEED_STEP = 0x9E3779B97F4A7C15  # odd, so that the choices' seeds differ

# Unsupported fields, of OpenAI's API and then of vLLM's and SGLang's extensions, with their neutral values. `True` is
# neutral for add_special_tokens and skip_special_tokens, because prompts get a bos and special tokens have no text.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "bad_words": ([],),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "add_special_tokens": (True,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
}

# Ignored fields of OpenAI's API and other servers; they do not affect the answer.
_IGNORED = frozenset(
    (
        "metadata", "priority", "prompt_cache_key", "prompt_cache_retention", "request_id",
        "safety_identifier", "service_tier", "store", "user",
    )
)  # fmt: skip


Prompt = str | tuple[int, ...]


class StreamOptions(BaseModel):
    """`stream_options`. include_usage: whether a final chunk reports the usage."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False  # random padding of chunks, which this server never adds


class CompletionRequest(BaseModel):
    """The body of `POST /v1/completions`. `prompt` is normalised to a tuple of prompts."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str = ALIAS
    prompt: tuple[Prompt, ...]
    max_tokens: int = Field(16, ge=0)
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, ge=0, le=1, allow_inf_nan=False)
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = Field(
        False, description="continue generating after an end-of-document token; an extension for benchmarks"
    )
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    logit_bias: dict[str, float] = Field(default_factory=dict, max_length=MOST_BIASES)
    presence_penalty: float = Field(0.0, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float = Field(0.0, ge=-2, le=2, allow_inf_nan=False)
    repetition_penalty: float = Field(1.0, gt=0, le=10, allow_inf_nan=False)
    top_k: int = Field(0, ge=-1, description="ids to sample from, the most likely ones; 0 and -1: all")
    min_p: float = Field(0.0, ge=0, le=1, allow_inf_nan=False)
    min_tokens: int = Field(0, ge=0, description="ids before which none of those that end an answer is generated")
    stop_token_ids: tuple[int, ...] = Field((), max_length=MOST_STOP_IDS)
    cache_salt: str = Field("", max_length=256, description="only requests with the same one share cached prompts")
    best_of: Any = None
    suffix: Any = None
    response_format: Any = None
    bad_words: Any = None
    length_penalty: Any = None
    use_beam_search: Any = None
    add_special_tokens: Any = None
    skip_special_tokens: Any = None
    spaces_between_special_tokens: Any = None
    include_stop_str_in_output: Any = None
    return_tokens_as_token_ids: Any = None
    return_token_ids: Any = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if value is not None and name not in _IGNORED}

    @field_validator("prompt", mode="plain", json_schema_input_type=str | list[str] | list[int] | list[list[int]])
    @classmethod
    def _prompts(cls, value: Any) -> tuple[Prompt, ...]:
        prompts = value if isinstance(value, list) and not _are_ids(value) else [value]
        found = tuple(tuple(p) if isinstance(p, list) and _are_ids(p) else p for p in prompts)
        if not found or not all(isinstance(prompt, str | tuple) for prompt in found):
            raise PydanticCustomError(
                "prompt", "must be a string, a list of strings, a list of token ids or a list of such lists, not empty"
            )
        if len(found) > MOST_PROMPTS:
            raise PydanticCustomError("prompt", f"may have up to {MOST_PROMPTS} prompts; send several requests")
        return found

    @field_validator("stop", mode="before")
    @classmethod
    def _stops(cls, value: Any) -> Any:
        stops = [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
            raise PydanticCustomError("stop", "must be a string or a list of strings, none of them empty")
        if len(stops) > MOST_STOPS:
            raise PydanticCustomError("stop", f"may have up to {MOST_STOPS} strings")
        if any(len(stop) > LONGEST_STOP for stop in stops):
            raise PydanticCustomError("stop", f"strings may have up to {LONGEST_STOP} characters")
        return tuple(stops)

    @field_validator("stop_token_ids", mode="before")
    @classmethod
    def _stop_ids(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("logit_bias")
    @classmethod
    def _biases(cls, value: dict[str, float]) -> dict[str, float]:
        for name, bias in value.items():
            if not (name.isascii() and name.isdecimal() and len(name) <= _LONGEST_ID) or not -100 <= bias <= 100:
                raise PydanticCustomError("logit_bias", f"{name:.20}: maps token ids to numbers from -100 to 100")
        if len({int(name) for name in value}) < len(value):
            raise PydanticCustomError("logit_bias", "names an id twice")
        return value

    @field_validator("seed")
    @classmethod
    def _seed(cls, value: int | None) -> int | None:
        if value is not None and value not in SEEDS:
            raise PydanticCustomError("seed", "must fit into 64 bits")
        return value

    @field_validator(*_NEUTRAL)
    @classmethod
    def _unsupported(cls, value: Any, info: ValidationInfo) -> Any:
        neutral = _NEUTRAL[str(info.field_name)]
        if value not in neutral:
            raise PydanticCustomError("unsupported", f"is not supported: remove it or set it to {neutral[0]!r}")
        return value

    @model_validator(mode="after")
    def _limits(self) -> CompletionRequest:
        if self.n * len(self.prompt) > MOST_ANSWERS:
            raise PydanticCustomError("n", f"n times prompts may be up to {MOST_ANSWERS}", {"param": "n"})
        if self.min_tokens > self.max_tokens:
            message = "must not exceed max_tokens"
            raise PydanticCustomError("min_tokens", message, {"param": "min_tokens"})
        return self

    @model_validator(mode="after")
    def _options_need_stream(self) -> CompletionRequest:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "stream_options", "is only allowed when stream is true", {"param": "stream_options"}
            )
        return self

    def requests(self, vocabulary: ServingVocabulary) -> list[Request]:
        """`n` engine requests per prompt, one after the other. Raises ApiError for text that cannot be encoded.

        A text prompt gets a bos if the model's tokenizer adds one. A prompt of ids gets a bos unless the tokenizer's
        files disable it. The choices of a prompt have seeds of their own.
        """
        return [
            dataclasses.replace(request, seed=None if self.seed is None else _choice_seed(self.seed, choice))
            for request in (self._request(prompt, vocabulary) for prompt in self.prompt)
            for choice in range(self.n)
        ]

    def _request(self, prompt: Prompt, vocabulary: ServingVocabulary) -> Request:
        return Request(
            prompt=_encode(prompt, vocabulary) if isinstance(prompt, str) else prompt,
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=min(max(self.top_k, 0), len(vocabulary.pieces)),
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=tuple((int(name), bias) for name, bias in self.logit_bias.items()),
            stop=self.stop,
            stop_ids=frozenset(self.stop_token_ids),
            logprobs=self.logprobs,
            echo=self.echo,
            ignore_eos=self.ignore_eos,
            cache_salt=self.cache_salt,
            bare=not vocabulary.adds_bos if isinstance(prompt, str) else vocabulary.adds_bos is False,
        )


def validation_error(errors: list[Any]) -> ApiError:
    """The first validation error of pydantic or FastAPI as an ApiError."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    location = [str(part) for part in first["loc"] if part != "body"]
    param = first.get("ctx", {}).get("param") or (location[0] if location else None)
    if param is None:
        return ApiError(400, "the body must be a JSON object, sent as Content-Type: application/json")
    message = first["msg"][:1].lower() + first["msg"][1:]
    if first["type"] == "extra_forbidden":
        fields = [*CompletionRequest.model_fields, *_IGNORED]
        message = "is not supported: remove it" + _did_you_mean(location[-1], fields)
    return ApiError(400, f"{'.'.join(location) or param}: {message}", param)


def context_length_error(message: str) -> ApiError:
    return ApiError(400, message, "max_tokens", "context_length_exceeded")


def check_model(model: str, name: str) -> None:
    """Raises ApiError for a model that is not the one served as `name`."""
    if model not in (name, ALIAS):
        message = f"the model {model!r} does not exist; this server serves {name!r}"
        raise ApiError(404, message, "model", "model_not_found")


def _choice_seed(seed: int, choice: int) -> int:
    """The first choice has the seed itself, so that it is the answer to a request without `n`."""
    return (seed + choice * _SEED_STEP - SEEDS.start) % (SEEDS.stop - SEEDS.start) + SEEDS.start


def _did_you_mean(name: str, fields: list[str]) -> str:
    near = difflib.get_close_matches(name, fields, 1, 0.75)
    return f"; did you mean {near[0]}?" if near else ""


def _are_ids(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(index, int) and not isinstance(index, bool) for index in value)


def _encode(text: str, vocabulary: ServingVocabulary) -> tuple[int, ...]:
    try:
        return tuple(vocabulary.encode(text))
    except ValueError as error:
        raise ApiError(400, f"prompt: {error}", "prompt") from error
