"""What a chat request is for the engine: a prompt by the model's template, and what the answer follows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from moray.pipelines.serve.answer_parser import THINK, THOUGHT, AnswerParser
from moray.pipelines.serve.api_error import ApiError
from moray.pipelines.serve.chat_request import ChatRequest, NamedTool
from moray.pipelines.serve.chat_template import ChatTemplate, ChatTemplateError, plain_text
from moray.pipelines.serve.detokenizer import ServingVocabulary
from moray.pipelines.serve.grammar import GrammarText
from moray.pipelines.serve.tool_format import ToolFormat, after_reasoning, format_of
from moray.pipelines.shared.chat_files import PLAIN_CHAT

_VARIABLES = frozenset(("messages", "tools", "documents", "add_generation_prompt"))
_OBJECTS = re.compile(r"arguments\s*(\.items|\|\s*items|is mapping)")


@dataclass(frozen=True)
class ChatPrompt:
    """text: of the prompt, in which `mark` is nothing. grammar: what the answer follows. shown: names of control tokens
    that the answer's text has."""

    text: str
    mark: str
    grammar: GrammarText | None
    shown: tuple[str, ...]
    tools: ToolFormat | None
    reasons: bool
    reasoning: bool

    def parser(self) -> AnswerParser:
        """Reads one answer to this prompt."""
        return AnswerParser(self.tools, self.reasons, self.reasoning)


class Chat:
    """The chat form of one model. template: None if the folder has none. problem: why its template is of no use."""

    def __init__(self, vocabulary: ServingVocabulary, template: ChatTemplate | None = None, problem: str = "") -> None:
        self._vocabulary = vocabulary
        self.template = template
        self._problem = problem
        source = template.source if template else ""
        self._format = format_of(source)
        self._reasons = THOUGHT in source

    @classmethod
    def load(cls, folder: Path, vocabulary: ServingVocabulary) -> Chat:
        """Reads the template of a model folder."""
        ids = {"bos_token": vocabulary.bos, "eos_token": vocabulary.eos}
        tokens = {name: vocabulary.label(index) for name, index in ids.items() if index is not None}
        try:
            return cls(vocabulary, ChatTemplate.load(folder, tokens))
        except ChatTemplateError as error:
            return cls(vocabulary, problem=str(error))

    @property
    def kind(self) -> str | None:
        """Where the template is from: `own` of the model, or Moray's `plain` form; None without one."""
        if self.template is None:
            return None
        return "plain" if self.template.source == PLAIN_CHAT.read_text("utf-8") else "own"

    def prompt(self, request: ChatRequest, answer: GrammarText | None) -> ChatPrompt:
        """The prompt of a request. answer: what its content must follow. Raises ApiError."""
        text, mark = self.render(request)
        tools = request.callable_tools
        form = self._tool_format() if tools else None
        grammar = answer
        if form:
            parallel = request.parallel_tool_calls and not isinstance(request.tool_choice, NamedTool)
            grammar = form.grammar(tools, self._vocabulary, request.must_call, parallel, answer)
        reasoning = self._reasons and text.rstrip().endswith(THINK)
        if reasoning:
            grammar = after_reasoning(THOUGHT, grammar, self._vocabulary)
        marks: tuple[str, ...] = (THINK, THOUGHT) if self._reasons else ()
        if form:
            marks += tuple(name for name in self._vocabulary.control_tokens if any(name in one for one in form.marks))
        shown = tuple(name for name in marks if name in self._vocabulary.control_tokens)
        return ChatPrompt(text, mark, grammar, shown, form, self._reasons, reasoning)

    def render(self, request: ChatRequest) -> tuple[str, str]:
        """The text of the prompt, and a mark in it that is nothing. Raises ApiError."""
        template = self._usable()
        variables = dict(request.chat_template_kwargs)
        if request.reasoning_effort is not None:
            variables["reasoning_effort"] = request.reasoning_effort
        for name in variables:
            field = "reasoning_effort" if name == "reasoning_effort" else "chat_template_kwargs"
            if name in _VARIABLES or not template.uses(name):
                raise ApiError(400, f"{field}: the model's chat template does not read {name!r:.80}", field)
        if request.shown_tools and not template.has_tools:
            raise ApiError(400, "tools: the model's chat template has no tools", "tools")
        objects = _OBJECTS.search(template.source) is not None
        try:
            messages = [message.variables(objects) for message in request.messages]
        except ValueError as error:
            raise ApiError(400, f"messages: {error}", "messages") from error
        if not template.uses("developer"):  # OpenAI's newer name of the role, which most templates would leave out
            messages = [{**one, "role": "system"} if one["role"] == "developer" else one for one in messages]
        try:
            given, mark = plain_text([messages, request.shown_tools], self._vocabulary.control_names)
            generate = request.add_generation_prompt and not request.continue_final_message
            text = template.render(given[0], given[1], variables, generate)
        except ChatTemplateError as error:
            raise ApiError(400, f"messages: {error}", "messages") from error
        return (_without_end(text, given[0][-1]["content"]) if request.continue_final_message else text), mark

    def _usable(self) -> ChatTemplate:
        if self.template is not None:
            return self.template
        reason = self._problem or "this model has no chat template"
        fix = "give it one with `moray models template`, or use /v1/completions"
        raise ApiError(400, f"{reason}: {fix}", "messages", "no_chat_template")

    def _tool_format(self) -> ToolFormat:
        if self._format is None:
            raise ApiError(400, "tools: how the model's chat template writes calls is not known", "tools")
        return self._format


def _without_end(text: str, content: str) -> str:
    """The prompt up to the end of the last message's content. Raises ApiError if the template changes it."""
    place = text.rfind(content.strip())
    if place < 0:
        message = "continue_final_message: the chat template does not show the last message as it is"
        raise ApiError(400, message, "continue_final_message")
    return text[: place + len(content.strip())]
