"""`moray chat`: conversations with a real server, and its commands."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from moray.pipelines.serve.async_engine import AsyncEngine
from moray.pipelines.serve.openai_api import build_serving_app
from moray.platform.cli.chat_command import Conversation, obey
from moray.platform.core.errors import InputError, MorayError
from tests.checkout import ROOT
from tests.loopback import serve_app
from tests.pipelines.serve.chats import REASONING, chat_engine, chat_form, chat_vocabulary


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    engine = chat_engine(chat_vocabulary(ends=()), 4096)  # answers end at their limits only
    app = build_serving_app(AsyncEngine(engine), "tiny", chat=chat_form(engine.vocabulary, REASONING))
    with serve_app(app) as served:
        yield served


@pytest.fixture
def talk(url: str) -> Iterator[Conversation]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        talk = Conversation(client, "", "", 1.0, 20)
        talk.choose_model()
        yield talk


def test_answers_are_kept_and_told_as_they_come(talk: Conversation) -> None:
    target = io.StringIO()
    talk.answer("In the beginning", target)
    talk.answer("and then", target)
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
    assert "(thinking) " in target.getvalue()  # of a model that reasons first
    assert "\x1b" not in target.getvalue()


def test_a_retry_replaces_the_answer(talk: Conversation) -> None:
    target = io.StringIO()
    with pytest.raises(InputError, match="no answer yet"):
        obey(talk, "/retry", target)
    talk.answer("In the beginning", target)
    assert obey(talk, "/retry", target)
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]


def test_commands(talk: Conversation, tmp_path: Path) -> None:
    target = io.StringIO()
    talk.answer("In", target)
    assert obey(talk, "/system Be brief.", target)
    assert obey(talk, f"/save {tmp_path / 'chat.json'}", target)
    saved = json.loads((tmp_path / "chat.json").read_text())
    assert saved["model"] == "tiny"
    assert [message["role"] for message in saved["messages"]] == ["system", "user", "assistant"]
    assert obey(talk, "/new", target)
    assert talk.messages == []
    assert obey(talk, "/help", target)
    assert not obey(talk, "/exit", target)
    for line, says in (("/foo", "unknown command"), ("/save", "needs the name"), ("/save /proc/no/file", "/proc/no")):
        with pytest.raises(InputError, match=says):
            obey(talk, line, target)


def test_a_message_that_is_refused_is_not_kept(talk: Conversation) -> None:
    with pytest.raises(MorayError, match="maximum context length"):
        talk.answer("ab" * 9000, io.StringIO())
    assert talk.messages == []


def test_the_model_must_be_one_of_the_server(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    with client, pytest.raises(InputError, match="no model 'other'"):
        Conversation(client, "other", "", 1.0, 0).choose_model()


def chat(home: Path, *arguments: str, **options) -> subprocess.CompletedProcess[str]:
    environment = {"MORAY_HOME": str(home), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, str(ROOT / "moray.py"), "chat", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, **options)


def test_a_pipe_is_answered_once(tmp_path: Path, url: str) -> None:
    done = chat(tmp_path, url, "--max-tokens", "8", input="In the beginning\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()


def test_nobody_answers(tmp_path: Path) -> None:
    done = chat(tmp_path, "http://127.0.0.1:9", input="x")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: the server does not answer\nhint: ")


def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path: Path, url: str) -> None:
    """In a terminal of its own, so that the key reaches the program as a signal."""
    environment = {"MORAY_HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "TERM": "dumb"}
    terminal, inner = pty.openpty()
    # setsid makes the terminal the program's own, as in a login.
    command = ["setsid", "--ctty", sys.executable, str(ROOT / "moray.py"), "chat", url, "--temperature", "1"]
    program = subprocess.Popen(command, stdin=inner, stdout=inner, stderr=inner, env=environment)
    os.close(inner)
    shown = b""

    def until(text: bytes) -> None:
        nonlocal shown
        while text not in shown:
            shown += os.read(terminal, 1024)

    until(b"> ")
    os.write(terminal, b"In the beginning\n")
    until(b"(thinking) ")  # 4,000 tokens follow
    os.write(terminal, b"\x03")
    until(b"(stopped)")
    shown = b""
    os.write(terminal, b"/help\n")
    until(b"/save FILE")
    shown = shown.partition(b"/save FILE")[2]
    until(b"\n> ")  # else the next key might reach the program before it reads
    shown = b""
    os.write(terminal, b"\x03")  # at the prompt: another prompt
    until(b"> ")
    os.write(terminal, b"\x04")
    assert program.wait(60) == 0
    os.close(terminal)
