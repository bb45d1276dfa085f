"""The wire format: fields that requests for answers have in common, and validation errors as in OpenAI's API.

Notable: no field is silently dropped. Unknown fields are refused by name. So are known fields that this server does not
support, of OpenAI's API and of other servers' extensions, unless they have their neutral value. Fields that do not
affect the answer (`user`, `metadata`) are ignored. Types are strict, as in OpenAI's API: "5" is not a number. `null`
means the default.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from moray.pipelines.serve.api_error import ALIAS, ApiError
from moray.pipelines.serve.detokenizer import ServingVocabulary
from moray.pipelines.serve.output_format import ResponseFormat, StructuredOutputs
from moray.pipelines.serve.sequence import SEEDS, Request

MOST_CHOICES = 128
MOST_ANSWERS = 256  # prompts times choices
MOST_BIASES = 300
MOST_STOP_IDS = 64
MOST_STOPS = 4
LONGEST_STOP = 1024  # characters, because every token searches the answer for it
_LONGEST_ID = 10  # digits
_SHOWN = 120  # characters of a name in an error
_SEED_STEP = 0x9E3779B97F4A7C15  # odd, so that the choices' seeds differ

# Ignored fields of OpenAI's API and other servers; they do not affect the answer.
IGNORED = frozenset(
    (
        "client_metadata", "metadata", "priority", "prompt_cache_key", "prompt_cache_retention", "request_id",
        "safety_identifier", "service_tier", "store", "user",
    )
)  # fmt: skip
_GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_decoding_backend")


class StreamOptions(BaseModel):
    """`stream_options`. include_usage: whether a final chunk reports the usage. continuous_usage_stats: whether every
    chunk does."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False  # random padding of chunks, which this server never adds


class AnswerFields(BaseModel):
    """Fields of both `POST /v1/completions` and `POST /v1/chat/completions`. `neutral`: fields that are not supported,
    with the values that change nothing. `refused`: others, with what to use instead."""

    model_config = ConfigDict(strict=True, extra="forbid")
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    refused: ClassVar[Mapping[str, str]] = {}

    model: str = ALIAS
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, ge=0, le=1, allow_inf_nan=False)
    stop: tuple[str, ...] = ()
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = Field(
        False, description="continue generating after an end-of-document token; an extension for benchmarks"
    )
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    logit_bias: dict[str, float] = Field(default_factory=dict, max_length=MOST_BIASES)
    presence_penalty: float = Field(0.0, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float = Field(0.0, ge=-2, le=2, allow_inf_nan=False)
    repetition_penalty: float = Field(1.0, ge=0.01, le=10, allow_inf_nan=False)
    top_k: int = Field(0, ge=-1, description="ids to sample from, the most likely ones; 0 and -1: all")
    min_p: float = Field(0.0, ge=0, le=1, allow_inf_nan=False)
    min_tokens: int = Field(0, ge=0, description="ids before which none of those that end an answer is generated")
    stop_token_ids: tuple[int, ...] = Field((), max_length=MOST_STOP_IDS)
    cache_salt: str = Field("", max_length=256, description="only requests with the same one share cached prompts")
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    return_tokens_as_token_ids: bool = Field(False, description="names tokens in logprobs `token_id:N`")

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, body: Any) -> Any:
        """Leaves out what is null, ignored or neutral. Names what to use instead of fields that are not supported."""
        if not isinstance(body, dict):
            return body
        found = {name: value for name, value in body.items() if value is not None and name not in IGNORED}
        for name, value in found.items():
            message = cls.refused.get(name)
            if message is None and name in _GUIDED:
                message = "is not supported: use structured_outputs"
            if message is None and name in cls.neutral and not _is_one_of(value, cls.neutral[name]):
                message = f"is not supported: remove it or set it to {cls.neutral[name][0]!r}"
            if message is not None:
                raise PydanticCustomError("unsupported", "{text}", {"param": name, "text": message})
        return {name: value for name, value in found.items() if name not in cls.neutral}

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

    @model_validator(mode="after")
    def _options_agree(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise field_error("stream_options", "is only allowed when stream is true")
        if self.response_format and self.response_format.type != "text" and self.structured_outputs:
            raise field_error("structured_outputs", "give response_format or structured_outputs, not both")
        return self

    def sampling(self, vocabulary: ServingVocabulary) -> dict[str, Any]:
        """The fields of the engine's request that do not depend on the route."""
        return {
            "min_tokens": self.min_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": min(max(self.top_k, 0), len(vocabulary.pieces)),
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": tuple((int(name), bias) for name, bias in self.logit_bias.items()),
            "stop": self.stop,
            "stop_ids": frozenset(self.stop_token_ids),
            "ignore_eos": self.ignore_eos,
            "cache_salt": self.cache_salt,
        }

    def choice_seed(self, choice: int) -> int | None:
        """The seed of one of `n` choices. The first has the seed itself, so that it is the answer to a request without
        `n`."""
        if self.seed is None:
            return None
        return (self.seed + choice * _SEED_STEP - SEEDS.start) % (SEEDS.stop - SEEDS.start) + SEEDS.start


def validation_error(errors: list[Any], kind: type[BaseModel]) -> ApiError:
    """The first validation error of pydantic or FastAPI as an ApiError. kind: of the body."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    # Without names of alternatives and of our classes, such as `dict[str,any]`.
    location = [str(part) for part in first["loc"] if part != "body" and not re.search(r"\[|^[A-Z]\w*$", str(part))]
    param = location[0] if location else None
    message = first["msg"][:1].lower() + first["msg"][1:]
    if named := first.get("ctx", {}).get("param"):
        location = [*location, named]
        param = location[0]
    if param is None:
        return ApiError(400, "the body must be a JSON object, sent as Content-Type: application/json")
    message = (
        re.sub(r"valid dictionary( or instance of \w+| or object to extract fields from)?", "JSON object", message)
        .replace("valid tuple", "list")
        .replace("valid list", "list")
    )
    if first["type"] == "extra_forbidden":
        fields = [*kind.model_fields, *getattr(kind, "neutral", ()), *IGNORED] if len(location) == 1 else []
        message = "is not supported: remove it" + _did_you_mean(location[-1], fields)
    written = message.encode("utf-8", "backslashreplace").decode()
    return ApiError(400, f"{_printable('.'.join(location))}: {written}", _printable(param))


def context_length_error(message: str) -> ApiError:
    return ApiError(400, message, "max_tokens", "context_length_exceeded")


def check_model(model: str, name: str) -> None:
    """Raises ApiError for a model that is not the one served as `name`."""
    if model not in (name, ALIAS):
        message = f"the model {model!r:.200} does not exist; this server serves {name!r}"
        raise ApiError(404, message, "model", "model_not_found")


def field_error(field: str, message: str) -> PydanticCustomError:
    """The error of a validator of several fields, for one of them."""
    return PydanticCustomError("value", "{text}", {"param": field, "text": message})


def choices(request: Request, fields: AnswerFields) -> list[Request]:
    """The engine's requests for all choices of a prompt."""
    return [dataclasses.replace(request, seed=fields.choice_seed(choice)) for choice in range(fields.n)]


def _printable(text: str) -> str:
    """A name from a body, short and as UTF-8 can write it."""
    return text[:_SHOWN].encode("utf-8", "backslashreplace").decode()


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed)


def _did_you_mean(name: str, fields: list[str]) -> str:
    near = difflib.get_close_matches(name, fields, 1, 0.75)
    return f"; did you mean {near[0]}?" if near else ""
