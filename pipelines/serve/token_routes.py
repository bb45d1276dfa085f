"""`/tokenize`, `/detokenize` and `/tokenizer_info`, in vLLM's form, which evaluation harnesses speak."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moray.pipelines.serve.api_error import ALIAS, ApiError
from moray.pipelines.serve.chat_prompt import Chat
from moray.pipelines.serve.chat_request import ChatRequest, FunctionTool, Message, check_last_message
from moray.pipelines.serve.completion_request import encode_text
from moray.pipelines.serve.detokenizer import ServingVocabulary, TextStream, Token
from moray.pipelines.serve.engine import Engine
from moray.pipelines.serve.intake import Intake
from moray.pipelines.serve.protocol import field_error


class TokenizeRequest(BaseModel):
    """The body of `POST /tokenize`: a text, or messages of a chat."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str = ALIAS
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    tools: list[FunctionTool] = Field(default_factory=list)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    add_special_tokens: bool = Field(True, description="whether a text gets the model's bos")
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise field_error("prompt", "give prompt or messages")
        if self.messages is not None and self.continue_final_message:
            check_last_message(self.messages)
        return self


class DetokenizeRequest(BaseModel):
    """The body of `POST /detokenize`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str = ALIAS
    tokens: list[int]


def tokenize(engine: Engine, intake: Intake, body: bytes, content_type: str) -> dict[str, Any]:
    """The response of /tokenize. Raises ApiError."""
    parsed = intake.parse(body, content_type, TokenizeRequest)
    if parsed.messages is not None:
        shared = ("model", "messages", "tools", "chat_template_kwargs", "continue_final_message")
        given = {name: getattr(parsed, name) for name in shared if name in parsed.model_fields_set}
        generate = parsed.add_generation_prompt and not parsed.continue_final_message
        ids = intake.rendered(ChatRequest.model_construct(**given, add_generation_prompt=generate))
    else:
        assert parsed.prompt is not None
        intake.check_length(len(parsed.prompt))
        ids = encode_text(parsed.prompt, engine.vocabulary)
        bos = engine.vocabulary.bos
        if parsed.add_special_tokens and engine.vocabulary.adds_bos and bos is not None and ids[:1] != (bos,):
            ids = (bos, *ids)
    found: dict[str, Any] = {"count": len(ids), "max_model_len": engine.config.max_position_embeddings}
    found["tokens"] = list(ids)
    found["token_strs"] = [engine.vocabulary.label(index) for index in ids] if parsed.return_token_strs else None
    return found


def detokenize(engine: Engine, intake: Intake, body: bytes, content_type: str) -> dict[str, str]:
    """The response of /detokenize: a text with the names of control tokens. Raises ApiError."""
    parsed = intake.parse(body, content_type, DetokenizeRequest)
    if any(not 0 <= index < engine.tokens for index in parsed.tokens):
        raise ApiError(400, f"tokens: an id is outside the vocabulary of {engine.tokens}", "tokens")
    stream = TextStream(engine.vocabulary, shown=frozenset(engine.vocabulary.control_tokens.values()))
    pieces = [stream.push(Token(index)).text for index in parsed.tokens]
    return {"prompt": "".join(pieces) + stream.finish().text}


def tokenizer_info(vocabulary: ServingVocabulary, chat: Chat) -> dict[str, Any]:
    """The response of /tokenizer_info."""
    names = {
        f"{kind}_token": None if index is None else vocabulary.label(index)
        for kind, index in (("bos", vocabulary.bos), ("eos", vocabulary.eos))
    }
    template = chat.template.source if chat.template else None
    return {"tokenizer_class": "PreTrainedTokenizerFast", **names, "chat_template": template}
