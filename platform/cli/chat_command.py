"""`moray chat`: a conversation with a model in the terminal."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

from cyclopts import App, Parameter

from moray.platform.core.atomic import write_json
from moray.platform.core.errors import InputError, MorayError, StepFailed
from moray.platform.core.home import Home
from moray.platform.run.console import err, visible

if TYPE_CHECKING:
    import openai

_HELP = """\
/system TEXT   what the model should know or how it should answer; without TEXT: show it
/new           begin a new conversation
/retry         ask for another answer to the last message
/save FILE     write the conversation as JSON
/help          this list
/exit          end; also Ctrl-D
Ctrl-C stops an answer. A line that ends with \\ continues on the next one."""
_SHOWN = "\t\n"  # control characters of an answer that reach the terminal
_HISTORY = 1000  # lines


def register_chat(app: App) -> None:
    app.command(chat)


def chat(
    model: str,
    /,
    *,
    name: Annotated[str, Parameter(name="--model", help="with a URL of several models: which one")] = "",
    key: Annotated[str, Parameter(help="key of the server (default: $MORAY_API_KEY)")] = "",
    system: Annotated[str, Parameter(help="system message")] = "",
    temperature: Annotated[float, Parameter(help="0: always the most likely token")] = 0.7,
    max_tokens: Annotated[int, Parameter(help="of an answer (default: as many as there is room for)")] = 0,
) -> int:
    """Chat with a model in the terminal.

    MODEL is the URL of a server (http://127.0.0.1:8000), the name of a deployment, or a model as for `moray serve`,
    which is then served for as long as the chat lasts. With input from a pipe, answers that once and ends.
    """
    home = Home.from_environment()
    with _server(model, home, key) as (url, own_key):
        talk = Conversation(_client(url, own_key), name, as_utf8(system), temperature, max_tokens)
        talk.choose_model()
        if not sys.stdin.isatty():
            return talk.answer(sys.stdin.read().strip(), sys.stdout)
        _greet(talk, url)
        with _line_history(home):
            _converse(talk)
    return 0


class Conversation:
    """Messages with one model of a server, which is asked through the `openai` client."""

    def __init__(self, client: openai.OpenAI, model: str, system: str, temperature: float, max_tokens: int) -> None:
        self._client = client
        self.model = model
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.card: dict[str, Any] = {}
        self._options: dict[str, Any] = {"temperature": temperature}
        if max_tokens:
            self._options["max_completion_tokens"] = max_tokens

    def choose_model(self) -> None:
        """Finds the model, or the only one. Raises InputError."""
        cards = {card.id: card for card in _asked(lambda: list(self._client.models.list()))}
        if not self.model and len(cards) == 1:
            self.model = next(iter(cards))
        if self.model not in cards:
            problem = f"the server has no model {self.model!r}" if self.model else "the server has several models"
            raise InputError(problem, f"use --model with one of {', '.join(sorted(cards))}")
        self.card = cards[self.model].model_dump()

    def answer(self, text: str, target: TextIO) -> int:
        """Sends a message and writes the answer as it comes. Ctrl-C stops it; what came so far is kept. Returns 0."""
        self.messages.append({"role": "user", "content": text})
        return self.again(target)

    def again(self, target: TextIO) -> int:
        """Asks for an answer to the last message. Raises MorayError, after which that message is gone."""
        parts: list[str] = []
        try:
            _asked(lambda: self._stream(parts, target))
        except KeyboardInterrupt:
            target.write("\n(stopped)")
        except MorayError:
            self.messages.pop()
            raise
        finally:
            target.write("\n")
            target.flush()
        self.messages.append({"role": "assistant", "content": "".join(parts)})
        return 0

    def forget_answer(self) -> bool:
        """Removes the last answer. Returns whether there was one."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            return False
        self.messages.pop()
        return True

    @property
    def whole(self) -> list[dict[str, str]]:
        """All messages, with that of the system."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.messages]

    def _stream(self, parts: list[str], target: TextIO) -> None:
        stream: Any = self._client.chat.completions.create(
            model=self.model,
            messages=self.whole,  # type: ignore[arg-type]
            stream=True,
            **self._options,
        )
        thinking = False
        with stream:
            for chunk in stream:
                for choice in chunk.choices:
                    thought = getattr(choice.delta, "reasoning_content", None) or ""
                    text = choice.delta.content or ""
                    if thought and not thinking:
                        target.write("(thinking) ")
                    if text and thinking:
                        target.write("\n\n")
                    thinking = bool(thought) or (thinking and not text)
                    shown = text if any(parts) else text.lstrip()  # no white space before an answer
                    parts.append(shown)
                    target.write(visible(thought + shown, _SHOWN))
                    target.flush()


def _converse(talk: Conversation) -> None:
    """Reads lines until the end of the input. Ctrl-C never ends it."""
    goes_on = True
    while goes_on:
        try:
            goes_on = _turn(talk)
        except KeyboardInterrupt:
            sys.stdout.write("\n")
        except MorayError as error:
            err().print(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""))


def _turn(talk: Conversation) -> bool:
    """Reads a line and does what it says. Returns False for the end of the chat."""
    try:
        line = _read()
    except EOFError:
        sys.stdout.write("\n")
        return False
    if line.startswith("/"):
        return obey(talk, line, sys.stdout)
    if line.strip():
        talk.answer(line, sys.stdout)
    return True


def obey(talk: Conversation, line: str, target: TextIO) -> bool:
    """Carries out a command. Returns False for the end of the chat. Raises InputError."""
    command, _, text = line[1:].partition(" ")
    text = text.strip()
    if command in ("exit", "quit"):
        return False
    if command == "system":
        talk.system = text or talk.system
        target.write(f"system: {visible(talk.system) or '(none)'}\n")
    elif command == "new":
        talk.messages.clear()
        target.write("a new conversation\n")
    elif command == "retry":
        if not talk.forget_answer():
            raise InputError("there is no answer yet", "write a message first")
        talk.again(target)
    elif command == "save":
        _save(talk, text, target)
    elif command == "help":
        target.write(_HELP + "\n")
    else:
        raise InputError(f"unknown command /{command}", "/help lists all")
    return True


def _save(talk: Conversation, file: str, target: TextIO) -> None:
    if not file:
        raise InputError("/save needs the name of a file", "/save chat.json")
    path = Path(file).expanduser()
    try:
        write_json(path, {"model": talk.model, "messages": talk.whole})
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}", "use another file") from error
    target.write(f"saved {len(talk.messages)} messages to {path}\n")


def _read() -> str:
    """A line, or several that end with a backslash."""
    lines = [input("> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input("  "))
    return as_utf8("\n".join(lines))


def as_utf8(text: str) -> str:
    """A text from the terminal, whose bytes that are not UTF-8 become U+FFFD."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _greet(talk: Conversation, url: str) -> None:
    err().print(f"{talk.model} at {url}   (/help lists commands, Ctrl-D ends)")
    if talk.card.get("chat_template") == "plain":
        err().print("This is a base model: it was not trained to chat, and continues the dialogue as any other text.")


@contextlib.contextmanager
def _line_history(home: Home) -> Iterator[None]:
    """Arrow keys bring back earlier lines, also those of earlier chats."""
    try:
        import readline
    except ImportError:  # Python was built without it
        yield
        return
    file = home.cache / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(_HISTORY)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)


@contextlib.contextmanager
def _server(model: str, home: Home, key: str) -> Iterator[tuple[str, str]]:
    """URL and key of a server with the model: the one at a URL, a deployment, or one that is started."""
    from moray.platform.core.api_keys import page_key

    key = key or os.environ.get("MORAY_API_KEY", "")
    if "://" in model:
        yield model.rstrip("/").removesuffix("/v1"), key
        return
    if (url := _deployed(model)) is not None:
        yield url, key or page_key(home)
        return
    from moray.platform.api import serving

    began = time.monotonic()
    err().print(f"starting {model} ...")
    with serving(model, port=0, home=home) as url:
        err().print(f"ready after {time.monotonic() - began:.0f} s")
        yield url, key or page_key(home)


def _deployed(name: str) -> str | None:
    """The URL of a running deployment of this MORAY_HOME; None if there is none of this name."""
    from moray.platform.client import Client

    try:
        found = Client.from_environment().get("/api/deployments")
    except MorayError:  # no control plane
        return None
    urls = [one["urls"] for one in found if one["name"] == name and one["urls"]]
    return str(urls[0][0]).removesuffix("/v1") if urls else None


def _client(url: str, key: str) -> openai.OpenAI:
    import openai

    return openai.OpenAI(base_url=f"{url}/v1", api_key=key or "none", timeout=600)


def _asked(work: Callable[[], Any]) -> Any:
    """The result of a request. Raises MorayError for what the server refuses."""
    import openai

    try:
        return work()
    except openai.AuthenticationError as error:
        raise InputError(_message(error), "use --key, or set MORAY_API_KEY") from error
    except openai.APIStatusError as error:
        raise InputError(_message(error)) from error
    except openai.APIConnectionError as error:
        raise StepFailed("the server does not answer", "check its address, and that it runs") from error
    except openai.APIError as error:  # in a stream
        raise StepFailed(str(error.message)) from error


def _message(error: openai.APIStatusError) -> str:
    """The server's own words."""
    with contextlib.suppress(ValueError, LookupError, TypeError):
        return str(json.loads(error.response.text)["error"]["message"])
    return f"the server answered with status {error.status_code}"
