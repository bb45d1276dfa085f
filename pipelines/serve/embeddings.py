"""`POST /v1/embeddings`: the mean of a text's states before the model's head, of length 1.

A language model is not trained for this. It is what such a model offers without further training.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from moray.pipelines.serve.api_error import ALIAS
from moray.pipelines.serve.api_response import ApiResponse, joined_deltas
from moray.pipelines.serve.completion_request import Prompt, as_prompts
from moray.pipelines.serve.engine import Engine
from moray.pipelines.serve.protocol import IGNORED, field_error
from moray.pipelines.serve.sequence import Delta, Request


class EmbeddingsRequest(BaseModel):
    """The body of `POST /v1/embeddings`. `input` is normalised to a tuple of prompts."""

    model_config = ConfigDict(strict=True, extra="forbid")
    neutral: ClassVar[tuple[str, ...]] = ()

    model: str = ALIAS
    input: tuple[Prompt, ...]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: None = Field(None, description="not supported: embeddings have the model's hidden size")

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        found = {name: value for name, value in body.items() if value is not None and name not in IGNORED}
        if "dimensions" in found:
            raise field_error("dimensions", "is not supported: embeddings have the model's hidden size")
        return found

    @field_validator("input", mode="plain", json_schema_input_type=str | list[str] | list[int] | list[list[int]])
    @classmethod
    def _inputs(cls, value: Any) -> tuple[Prompt, ...]:
        return as_prompts(value)


class EmbeddingsResponse(ApiResponse):
    """A list of embeddings, which is not streamed. encoding: `float`, or `base64` of little-endian float32."""

    def __init__(self, engine: Engine, model: str, requests: Sequence[Request], encoding: str) -> None:
        super().__init__(engine, model, requests)
        self._encoding = encoding

    def chunk(self, index: int, delta: Delta) -> bytes:
        raise NotImplementedError("embeddings are not streamed")

    def end(self) -> bytes:
        raise NotImplementedError("embeddings are not streamed")

    def whole(self, answers: Sequence[Sequence[Delta]]) -> dict[str, Any]:
        data = [
            {"object": "embedding", "index": index, "embedding": self._written(joined_deltas(deltas))}
            for index, deltas in enumerate(answers)
        ]
        usage = {"prompt_tokens": self.prompt_tokens, "total_tokens": self.prompt_tokens}
        return {"object": "list", "data": data, "model": self._model, "usage": usage}

    def _written(self, delta: Delta) -> list[float] | str:
        import torch

        assert delta.embedding is not None
        unit = torch.nn.functional.normalize(delta.embedding, dim=0)
        if self._encoding == "base64":
            return base64.b64encode(unit.numpy().astype("<f4").tobytes()).decode()
        found: list[float] = unit.tolist()
        return found
