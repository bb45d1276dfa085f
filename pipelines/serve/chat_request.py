"""The body of `POST /v1/chat/completions`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from moray.pipelines.serve.chat_template import ArgumentText
from moray.pipelines.serve.output_format import checked_schema
from moray.pipelines.serve.protocol import AnswerFields, field_error
from moray.pipelines.serve.tool_format import Tool

MOST_MESSAGES = 10_000
MOST_TOOLS = 128
MOST_TOP_LOGPROBS = 20
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


def _text(value: Any) -> Any:
    """The text of a content, which is a string or a list of parts."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "output_text", "refusal"):
            raise PydanticCustomError(
                "content", "parts must have type text; this server's models read no {kind}", {"kind": str(kind)[:40]}
            )
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise PydanticCustomError("content", "a part of type {kind} needs a text", {"kind": kind})
        texts.append(text)
    return "\n".join(texts)


Text = Annotated[str, BeforeValidator(_text, json_schema_input_type=str | list[dict[str, Any]])]


class CalledFunction(BaseModel):
    """`function` of a tool call: its name, and its arguments as JSON."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: str
    arguments: str = "{}"  # no JSON, if the answer was cut

    def as_object(self) -> dict[str, Any]:
        """The arguments for templates that read an object. Raises ValueError."""
        try:
            found = json.loads(self.arguments)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise ValueError(f"the arguments of a call of {self.name:.80} must be a JSON object, as a string")
        return found


class ToolCall(BaseModel):
    """A call that an assistant made."""

    model_config = ConfigDict(strict=True, extra="ignore")  # `index` of a stream is no matter

    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(BaseModel):
    """A message of the conversation."""

    model_config = ConfigDict(strict=True, extra="forbid")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, value: Any) -> Any:
        """Fields of answers, which clients send back: those without a content, and another name of the reasoning."""
        if not isinstance(value, dict):
            return value
        kept = {name: part for name, part in value.items() if part is not None and name != "annotations"}
        if "reasoning" in kept:
            kept.setdefault("reasoning_content", kept.pop("reasoning"))
        if isinstance(kept.get("refusal"), str):
            kept.setdefault("content", kept.pop("refusal"))
        return kept

    @model_validator(mode="after")
    def _belongs_to_role(self) -> Self:
        if self.role == "tool" and not self.tool_call_id:
            raise PydanticCustomError("message", "a message of role tool needs tool_call_id")
        if self.role != "assistant" and (self.tool_calls or self.reasoning_content):
            raise PydanticCustomError("message", "only messages of role assistant have tool_calls or reasoning_content")
        if self.content is None and not self.tool_calls:
            raise PydanticCustomError("message", "needs content")
        return self

    def variables(self, arguments_as_objects: bool) -> dict[str, Any]:
        """The message as chat templates read it. Raises ValueError for arguments that are no object."""
        found: dict[str, Any] = {"role": self.role, "content": self.content or ""}
        for name in ("name", "tool_call_id", "reasoning_content"):
            if (value := getattr(self, name)) is not None:
                found[name] = value
        if self.tool_calls:
            found["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": call.function.as_object()
                        if arguments_as_objects
                        else ArgumentText(call.function.arguments),
                    },
                }
                for call in self.tool_calls
            ]
        return found


class Function(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @field_validator("name")
    @classmethod
    def _is_name(cls, value: str) -> str:
        if not _NAME.fullmatch(value):
            raise PydanticCustomError("name", "must be 1 to 64 letters, digits, dots, dashes and underscores")
        return value

    @field_validator("parameters")
    @classmethod
    def _is_schema(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and value.get("type", "object") != "object":
            raise PydanticCustomError("parameters", "must be a JSON Schema of type object")
        return None if value is None else checked_schema(value)


class FunctionTool(BaseModel):
    """An element of `tools`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["function"]
    function: Function


class NamedFunction(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    name: str


class NamedTool(BaseModel):
    """A `tool_choice` that names the tool to call."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["function"]
    function: NamedFunction


def checked_tool_choice(value: Any, form: str) -> Any:
    """Raises a pydantic error for what is neither a word nor looks like the named tool in the given form."""
    fields = set(json.loads(form.replace("NAME", '""')))
    if value not in ("none", "auto", "required") and not (isinstance(value, dict) and set(value) == fields):
        raise PydanticCustomError("tool_choice", "must be none, auto, required or {form}", {"form": form})
    return value


def check_last_message(messages: list[Message]) -> None:
    """Raises a pydantic error if the last message cannot be continued."""
    if messages[-1].role != "assistant" or not messages[-1].content:
        raise field_error("continue_final_message", "is only allowed when the last message is a text of role assistant")


class ChatRequest(AnswerFields):
    """The body of `POST /v1/chat/completions`."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "modalities": (["text"],),
        "verbosity": ("medium",),
        "bad_words": ([],),
        "length_penalty": (1,),
        "use_beam_search": (False,),
        "add_special_tokens": (False,),
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True,),
        "include_stop_str_in_output": (False,),
        "return_token_ids": (False,),
        "include_reasoning": (True,),
        "separate_reasoning": (True,),
        "echo": (False,),
        "best_of": (1,),
    }
    refused: ClassVar[Mapping[str, str]] = {
        "functions": "is not supported: use tools",
        "function_call": "is not supported: use tool_choice",
        "prompt": "belongs to /v1/completions; this route reads messages",
        "chat_template": "is not supported: the template is that of the model",
        "audio": "is not supported: this server's models read and write text",
        "web_search_options": "is not supported: this server searches nothing",
        "prediction": "is not supported: remove it",
    }

    messages: list[Message] = Field(..., min_length=1, max_length=MOST_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1, description="older name of max_completion_tokens")
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MOST_TOP_LOGPROBS)
    tools: list[FunctionTool] = Field(default_factory=list, max_length=MOST_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True
    reasoning_effort: str | None = Field(None, max_length=64, description="for templates that read it")
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict, description="variables of the template")
    add_generation_prompt: bool = True
    continue_final_message: bool = Field(False, description="continues the last message instead of answering it")

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _is_choice(cls, value: Any) -> Any:
        return checked_tool_choice(value, '{"type": "function", "function": {"name": NAME}}')

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise field_error("top_logprobs", "is only allowed when logprobs is true")
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise field_error("tools", "two functions have the same name")
        if self.tool_choice not in (None, "none") and not names:
            raise field_error("tool_choice", "is only allowed when tools are given")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise field_error(
                "tool_choice", f"names a function that is not in tools: {self.tool_choice.function.name:.80}"
            )
        if self.limit is not None and self.min_tokens > self.limit:
            raise field_error("min_tokens", "must not exceed max_completion_tokens")
        if self.continue_final_message:
            check_last_message(self.messages)
        if (
            self.continue_final_message
            and "add_generation_prompt" in self.model_fields_set
            and self.add_generation_prompt
        ):
            raise field_error("add_generation_prompt", "must be false with continue_final_message")
        return self

    @property
    def limit(self) -> int | None:
        """The most ids to generate; None for as many as there is room for."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def callable_tools(self) -> list[Tool]:
        """The functions that may be called in this answer."""
        if self.tool_choice == "none":
            return []
        functions = [tool.function for tool in self.tools]
        if isinstance(self.tool_choice, NamedTool):
            functions = [one for one in functions if one.name == self.tool_choice.function.name]
        return [Tool(one.name, one.parameters or {}, bool(one.strict)) for one in functions]

    @property
    def must_call(self) -> bool:
        """Whether the answer has to be a call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def shown_tools(self) -> list[dict[str, Any]]:
        """The tools as the template reads them."""
        if self.tool_choice == "none":
            return []
        return [tool.model_dump(exclude_none=True) for tool in self.tools]
