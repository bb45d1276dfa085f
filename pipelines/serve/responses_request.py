"""The body of `POST /v1/responses`, as a request for a chat answer.

Nothing is stored: each request holds the whole conversation, as `input`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError

from moray.pipelines.serve.chat_request import (
    MOST_MESSAGES,
    MOST_TOOLS,
    ChatRequest,
    Function,
    Text,
    checked_tool_choice,
)
from moray.pipelines.serve.output_format import JsonSchema
from moray.pipelines.serve.protocol import AnswerFields, field_error

# Names of a chat's fields in this request, for errors.
FIELDS = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format": "text",
    "reasoning_effort": "reasoning",
}
_CHAT_ONLY = ("messages", "max_tokens", "max_completion_tokens", "response_format", "n", "logprobs", "functions")


class _Item(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")  # ids and states of items that clients send back


class InputMessage(_Item):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text


class InputCall(_Item):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class InputResult(_Item):
    """What the called function returned."""

    type: Literal["function_call_output"]
    call_id: str
    output: Text


class _ReasoningText(_Item):
    text: str


class InputReasoning(_Item):
    """Reasoning that preceded the next item."""

    type: Literal["reasoning"]
    content: list[_ReasoningText] | None = None


def _kind(item: Any) -> str | None:
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)
    return kind if isinstance(kind, str) else None


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputResult, Tag("function_call_output")]
    | Annotated[InputReasoning, Tag("reasoning")],
    Discriminator(
        _kind,
        custom_error_type="item",
        custom_error_message="must be of type message, function_call, function_call_output or reasoning",
    ),
]


class ResponseTool(Function):
    """An element of `tools`: a function."""

    type: Literal["function"]

    @model_validator(mode="before")
    @classmethod
    def _is_function(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") != "function":
            raise PydanticCustomError("tool", "must be of type function: this server has no tools of its own")
        return value


class NamedResponseTool(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["function"]
    name: str


class TextFormat(JsonSchema):
    """`text.format`: text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    schema_: dict[str, Any] | bool = Field(default_factory=dict, alias="schema")

    def response_format(self) -> dict[str, Any]:
        if self.type != "json_schema":
            return {"type": self.type}
        return {"type": self.type, "json_schema": {"name": self.name, "schema": self.schema_, "strict": self.strict}}


class TextOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None

    @field_validator("format")
    @classmethod
    def _has_schema(cls, value: TextFormat | None) -> TextFormat | None:
        if value is not None and (value.type == "json_schema") != ("schema_" in value.model_fields_set):
            raise field_error("schema", "must be given with type json_schema, and only then")
        return value


class Reasoning(BaseModel):
    """`reasoning`. effort: for templates that read it."""

    model_config = ConfigDict(strict=True, extra="forbid")

    effort: str | None = Field(None, max_length=64)
    summary: None = Field(None, description="not supported: responses have the reasoning itself")


class ResponsesRequest(AnswerFields):
    """The body of `POST /v1/responses`."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "background": (False,),
        "include": ([], ["reasoning.encrypted_content"]),
        "truncation": ("disabled",),
        "top_logprobs": (0,),
    }
    refused: ClassVar[Mapping[str, str]] = {
        "previous_response_id": "is not supported: this server stores no responses; send the conversation as input",
        "conversation": "is not supported: this server stores no conversations; send the conversation as input",
        "prompt": "is not supported: this server stores no prompts; send instructions and input",
        **{name: f"belongs to /v1/chat/completions; use {FIELDS.get(name, 'that route')}" for name in _CHAT_ONLY},
    }

    input: list[InputItem] = Field(..., json_schema_extra={"description": "or a text of the user"})
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    tools: list[ResponseTool] = Field(default_factory=list, max_length=MOST_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedResponseTool = "auto"
    parallel_tool_calls: bool = True
    text: TextOptions = Field(default_factory=TextOptions)
    reasoning: Reasoning = Field(default_factory=Reasoning)
    max_tool_calls: int | None = Field(None, ge=1, description="of tools of the server, which has none")
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict, description="variables of the template")

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _is_choice(cls, value: Any) -> Any:
        return checked_tool_choice(value, '{"type": "function", "name": NAME}')

    @field_validator("input", mode="before")
    @classmethod
    def _items(cls, value: Any) -> Any:
        if isinstance(value, str) and value:
            return [{"role": "user", "content": value}]
        if not isinstance(value, list) or not 0 < len(value) <= MOST_MESSAGES:
            raise PydanticCustomError(
                "input", "must be a text that is not empty, or a list of 1 to {n} items", {"n": MOST_MESSAGES}
            )
        return value

    def chat(self) -> ChatRequest:
        """The request for a chat answer. Raises ValidationError with names of its fields, for which see `FIELDS`."""
        own = {*type(self).model_fields} - {*ChatRequest.model_fields}
        given = {
            name: getattr(self, name)
            for name in self.model_fields_set - own - {"tools", "tool_choice", "stream_options", "structured_outputs"}
        }
        if isinstance(given.get("stop"), tuple):
            given["stop"] = list(given["stop"])
        if self.tools:
            given["tools"] = [
                {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
                for tool in self.tools
            ]
        if isinstance(self.tool_choice, NamedResponseTool):
            given["tool_choice"] = {"type": "function", "function": {"name": self.tool_choice.name}}
        elif self.tools or self.tool_choice != "auto":
            given["tool_choice"] = self.tool_choice
        if self.text.format is not None:
            given["response_format"] = self.text.format.response_format()
        if self.structured_outputs is not None:
            given["structured_outputs"] = self.structured_outputs.model_dump(
                mode="json", exclude_none=True, by_alias=True
            )
        return ChatRequest.model_validate(
            {
                **given,
                "messages": list(self._messages()),
                "max_completion_tokens": self.max_output_tokens,
                "reasoning_effort": self.reasoning.effort,
            }
        )

    def _messages(self) -> Iterator[dict[str, Any]]:
        if self.instructions is not None:
            yield {"role": "system", "content": self.instructions}
        yield from _messages(self.input)


def _messages(items: Sequence[InputMessage | InputCall | InputResult | InputReasoning]) -> Iterator[dict[str, Any]]:
    """The messages of a chat. Reasoning, text and calls that follow each other are one message of the assistant."""
    answer: dict[str, Any] = {}
    for item in items:
        follows = isinstance(item, InputCall) or (isinstance(item, InputMessage) and item.role == "assistant")
        if answer and (not follows or ("content" in answer and isinstance(item, InputMessage))):
            yield from _finished(answer)
            answer = {}
        match item:
            case InputReasoning():
                answer = {"reasoning_content": "\n".join(part.text for part in item.content or [])}
            case InputCall():
                function = {"name": item.name, "arguments": item.arguments}
                answer.setdefault("tool_calls", []).append({"id": item.call_id, "function": function})
            case InputResult():
                yield {"role": "tool", "tool_call_id": item.call_id, "content": item.output}
            case InputMessage(role="assistant"):
                answer["content"] = item.content
            case InputMessage():
                yield {"role": item.role, "content": item.content}
    yield from _finished(answer)


def _finished(answer: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The assistant's message, unless it has nothing but reasoning."""
    if "content" in answer or "tool_calls" in answer:
        yield {"role": "assistant", **{name: part for name, part in answer.items() if part or name == "content"}}
