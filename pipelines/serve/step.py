"""smoke-serve: serves the registered model on Ray Serve, sends it a few prompts over HTTP, and records the answers.

Prompts are sent with the public `openai` client, first several at once with one of them streamed, then each alone. With
greedy sampling the answers should be equal, and the transcript records whether they are. A difference is not a failure,
because FP32 sums in another order can change the choice between two almost equally likely tokens.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import ClassVar

from pydantic import Field

from moray.platform.core.api_keys import ApiKey, hash_key, is_loopback
from moray.platform.core.atomic import write_json, write_text
from moray.platform.core.errors import StepFailed
from moray.platform.plan.config import StepConfig, operational
from moray.platform.plan.context import StepContext
from moray.platform.plan.step import Step
from moray.platform.store.paths import AnyPath

HOST = "127.0.0.1"
PREFIX = "smoke-"  # of the name under which the model is served, beside deployments of the same model
_ATTEMPTS = 3  # to serve, of which each but the last may lose a host


class SmokeServeConfig(StepConfig):
    prompts: tuple[str, ...] = Field(
        ("In the beginning", "def main(", "The license", "import numpy as"), min_length=1, description="prompts to send"
    )
    max_tokens: int = Field(48, ge=1, description="maximum tokens of an answer")
    temperature: float = Field(0.0, ge=0.0, le=2.0, description="sampling temperature; 0: greedy")
    seed: int = Field(1, ge=0, description="sampling seed, used if temperature is above 0")
    concurrent: int = operational(4, ge=1, description="maximum concurrent requests")


@dataclass(frozen=True)
class Reply:
    """One answer received over HTTP. seconds: of the whole request. first_token_seconds: only for a stream."""

    prompt: str
    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    streamed: bool = False
    first_token_seconds: float | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding rate: tokens after the first, over the time after the first."""
        if self.first_token_seconds is None or self.completion_tokens < 2:
            return None
        return (self.completion_tokens - 1) / max(self.seconds - self.first_token_seconds, 1e-9)


class SmokeServe(Step[SmokeServeConfig]):
    name: ClassVar[str] = "smoke-serve"
    version: ClassVar[int] = 1
    Config = SmokeServeConfig
    inputs: ClassVar[Mapping[str, str]] = {"model": "registration"}
    produces: ClassVar[str] = "transcript"
    needs_ray: ClassVar[bool] = True

    def run(self, ctx: StepContext[SmokeServeConfig]) -> None:
        from moray.pipelines.serve.session import ANY_HOST

        registration = json.loads((ctx.inputs["model"].folder / "registration.json").read_text())
        folder = ctx.artifact(registration["model"]).location
        host = HOST if ctx.cluster.shares_files else ANY_HOST  # the driver and Serve's proxy may be on two hosts
        ctx.cluster.ensure()
        with ctx.cluster.exclusive("serve", ctx.cancel):
            for left in reversed(range(_ATTEMPTS)):
                try:
                    replies = _serve_once(ctx, folder, registration["name"], host)
                    break
                except _lost() as error:  # Serve does not survive Ray's head, nor an answer its replica
                    if not left:
                        raise StepFailed(f"serving failed {_ATTEMPTS} times: {error}", "see Ray's logs") from error
                    ctx.note(f"serving starts again: {type(error).__name__}", "warning")
        _write(ctx, registration["name"], *replies)


def _lost() -> tuple[type[Exception], ...]:
    """Errors of a host, of Ray's head or of a connection that was lost."""
    import openai
    from ray.exceptions import RayError

    return RayError, openai.APIConnectionError, openai.InternalServerError


def _serve_once(
    ctx: StepContext[SmokeServeConfig], folder: AnyPath, name: str, host: str
) -> tuple[list[Reply], list[Reply]]:
    """Serves the model and sends it every prompt. Returns the replies to concurrent and to single requests."""
    from moray.pipelines.serve.session import clear_sessions, open_session

    clear_sessions(PREFIX)  # a killed run may have left its model on a cluster that outlives its runs
    ctx.progress("deploying", 0, 1, "replicas")
    key, keys = "none", None
    if not is_loopback(host):  # other machines reach the model while it is tested
        key = secrets.token_urlsafe(32)
        keys = [ApiKey(name="smoke-serve", sha256=hash_key(key))]
    session = open_session(folder, PREFIX + name, host, gpus=ctx.cluster.topology().gpus, keys=keys)
    try:
        ctx.progress("deploying", 1, 1, "replicas")
        client = SmokeClient(f"{session.url}/v1", session.name, ctx.config, key)
        client.check_model_listed()
        return _send_all(ctx, client)
    finally:
        session.stop()


class SmokeClient:
    """Sends this step's prompts with the `openai` package."""

    def __init__(self, url: str, model: str, config: SmokeServeConfig, key: str) -> None:
        import openai

        self._openai = openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=300)
        self._model = model
        self._config = config

    def check_model_listed(self) -> None:
        served = [model.id for model in self._openai.models.list()]
        if self._model not in served:
            raise StepFailed(f"/v1/models lists {served} instead of {self._model!r}")

    def complete(self, prompt: str) -> Reply:
        began = time.monotonic()
        answer = self._openai.completions.create(
            model=self._model,
            prompt=prompt,
            max_tokens=self._config.max_tokens,
            temperature=self._config.temperature,
            seed=self._config.seed,
        )
        seconds = time.monotonic() - began
        if answer.usage is None:
            raise StepFailed("a response has no usage")
        choice, usage = answer.choices[0], answer.usage
        return Reply(prompt, choice.text, choice.finish_reason, usage.prompt_tokens, usage.completion_tokens, seconds)

    def complete_streamed(self, prompt: str) -> Reply:
        began = time.monotonic()
        stream = self._openai.completions.create(
            model=self._model,
            prompt=prompt,
            max_tokens=self._config.max_tokens,
            temperature=self._config.temperature,
            seed=self._config.seed,
            stream=True,
            stream_options={"include_usage": True},
        )
        parts: list[str] = []
        first: float | None = None
        reason, usage = "", None
        for chunk in stream:
            first = first if first is not None else time.monotonic() - began
            usage = chunk.usage or usage
            for choice in chunk.choices:
                parts.append(choice.text)
                reason = choice.finish_reason or reason
        seconds = time.monotonic() - began
        if usage is None:
            raise StepFailed("a stream ended without usage")
        return Reply(prompt, "".join(parts), reason, usage.prompt_tokens, usage.completion_tokens, seconds, True, first)


def _send_all(ctx: StepContext[SmokeServeConfig], client: SmokeClient) -> tuple[list[Reply], list[Reply]]:
    """Sends every prompt, `concurrent` at a time with the first streamed, then every prompt alone."""
    prompts = ctx.config.prompts
    with ThreadPoolExecutor(ctx.config.concurrent) as pool:
        streamed = pool.submit(client.complete_streamed, prompts[0])
        waiting = [streamed, *(pool.submit(client.complete, prompt) for prompt in prompts[1:])]
        together = []
        for done, future in enumerate(waiting):
            ctx.progress("requesting", done, 2 * len(prompts), "requests")
            together.append(future.result())
    alone = []
    for done, prompt in enumerate(prompts):
        ctx.progress("requesting", len(prompts) + done, 2 * len(prompts), "requests")
        alone.append(client.complete(prompt))
    ctx.progress("requesting", 2 * len(prompts), 2 * len(prompts), "requests")
    return together, alone


def _write(ctx: StepContext[SmokeServeConfig], name: str, together: list[Reply], alone: list[Reply]) -> None:
    streamed = together[0]
    invariant = all(one.text == other.text for one, other in zip(together, alone, strict=True))
    speed = streamed.tokens_per_second
    write_json(
        ctx.folder / "transcript.json",
        {
            "model": name,
            "config": ctx.config.model_dump(mode="json"),
            "concurrent": [asdict(reply) for reply in together],
            "alone": [asdict(reply) for reply in alone],
            "batch_invariant": invariant,
            "first_token_seconds": streamed.first_token_seconds,
            "tokens_per_second": speed,
        },
    )
    write_text(ctx.folder / "closing.txt", closing_text(name, together))
    replies = [*together, *alone]
    ctx.counts |= {"in:requests": len(replies), "out:tokens": sum(reply.completion_tokens for reply in replies)}
    latency = (
        "" if streamed.first_token_seconds is None else f"first token after {streamed.first_token_seconds * 1e3:.0f} ms"
    )
    ctx.outcome = ", ".join(part for part in (latency, f"{speed:.0f} tokens/s" if speed else "") if part)


def closing_text(name: str, replies: list[Reply]) -> str:
    """The text that is printed at the end of a run: the first prompt and its answer."""
    first = replies[0]
    answer = "\n".join(f"  | {line}" for line in (first.prompt + first.text).splitlines())
    return f"over HTTP, {name} continues {first.prompt!r}:\n{answer}\n"


step = SmokeServe()
