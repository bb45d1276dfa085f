"""An OpenAI-compatible server for tests: it computes its answers, and on some prompts it fails as real ones do."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response


@dataclass
class TeacherServer:
    """url; what was asked, as (prompt, seed); down: it answers 503; hold: prompts from this place on get no answer."""

    url: str = ""
    asked: list[tuple[str, int]] = field(default_factory=list)
    down: bool = False
    hold: int | None = None
    holding: threading.Event = field(default_factory=threading.Event)

    async def answer(self, request: Request) -> Response:
        body: dict[str, Any] = await request.json()
        prompt, seed = body["messages"][0]["content"], body["seed"]
        self.asked.append((prompt, seed))
        if self.hold is not None and len(self.asked) > self.hold:
            self.holding.set()
            await asyncio.sleep(60)
        if self.down:
            return JSONResponse({"error": {"message": "no engine"}}, 503)
        if "POISON" in prompt:
            return JSONResponse({"error": {"message": "this prompt is not served"}}, 400)
        if "GARBAGE" in prompt:
            return PlainTextResponse("<html>not what you think</html>")
        message = {"role": "assistant", "content": compute(prompt, seed)}
        return JSONResponse(
            {
                "id": "1",
                "object": "chat.completion",
                "created": 1,
                "model": body["model"],
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30},
            }
        )


def compute(prompt: str, seed: int) -> str:
    """Right most of the time: one in four answers, by seed, is wrong, and some have another form."""
    off = 1 if seed % 4 == 0 else 0
    if prompt.startswith("Write one mathematics problem"):
        a, b = seed % 97, seed % 89
        return f"Problem: A box holds {a} + {b} nuts. How many?\nSolution: Add them. \\boxed{{{a + b + off}}}"
    if sums := re.search(r"(-?\d+(?: [+-] \d+)+)", prompt):
        total = sum(int(term.replace(" ", "")) for term in re.findall(r"(?:^-?|[+-] )\d+", sums[1]))
        return f"I add from left to right. \\boxed{{{total + off}}}"
    if prompt.startswith("Invent a small programming task"):
        return (
            f"Add {seed} to a number.\n```python\ndef add(x):\n    return x + {seed + off}\n```\nTests:\n"
            f"```python\nassert add(0) == {seed}\nassert add(1) == {seed + 1}\nassert add(-1) == {seed - 1}\n```"
        )
    return "What is it about? " + " ".join(prompt.split()[-30:]) + f" That is all there is to say, {seed}."


@contextmanager
def teacher_server() -> Iterator[TeacherServer]:
    made, app = TeacherServer(), FastAPI()
    app.add_api_route("/v1/chat/completions", made.answer, methods=["POST"], response_model=None)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        made.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
        thread.start()
        yield made
        server.should_exit = True
        thread.join(timeout=10)
