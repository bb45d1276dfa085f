"""Serving under load: requests that arrive at random, a key that sends ten times as much, grammars that are compiled.

One replica serves a model of the size of the quickstart's, with random weights, as `moray serve` does, with keys. A
request streams 32 ids after a prompt of 64. Its capacity is what 16 clients get that always have one open. Then
requests arrive as a Poisson process at shares of that, whether or not earlier ones have been answered.

Usage: python benchmarks/serving_load.py [seconds=20]
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from harness.result import Bar, report
from serving_http import ids, make_model

PROMPT, NEW, CLIENTS = 64, 32, 16
OVERLOAD_SECONDS = 3  # times as long, so that the queue fills
MEASURES = ("moray.pipelines.serve.application", "moray.pipelines.serve.gateway", "moray.pipelines.serve.openai_api")
HOSTILE: list[dict[str, Any]] = [
    {"enum": [f"value {number}" for number in range(10_000)]},
    {"type": "string", "pattern": "(a|b|ab)*c" * 50},
    {"allOf": [{"anyOf": [{"type": "object", "properties": {f"p{a}{b}": {}}} for a in range(12)]} for b in range(12)]},
    {"type": "object", "properties": {f"field{n}": {"type": "string", "maxLength": n} for n in range(1, 400)}},
]


@dataclass
class Seen:
    """Requests: seconds to the first token of answered ones, seconds of refused ones, and others' statuses."""

    first: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    other: list[str] = field(default_factory=list)

    def percentile(self, share: float) -> float:
        return _percentile(self.first, share)


def _percentile(seconds: list[float], share: float) -> float:
    ordered = sorted(seconds)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


class Asker:
    """A client with a key."""

    def __init__(self, session: aiohttp.ClientSession, url: str, key: str) -> None:
        self._session, self._url = session, f"{url}/v1/completions"
        self._headers = {"Authorization": f"Bearer {key}"}
        self._number = 0

    async def ask(self, seen: Seen, **options: Any) -> list[float]:
        """One streamed request. Returns the times of its events."""
        self._number += 1
        body = {"prompt": ids(self._number, time.monotonic_ns(), PROMPT), "max_tokens": NEW, "temperature": 0}
        body |= {"ignore_eos": True, "stream": True, **options}
        began, times = time.perf_counter(), []
        async with self._session.post(self._url, json=body, headers=self._headers) as response:
            if response.status != 200:
                await response.read()
                if response.status in (429, 503):
                    seen.refused.append(time.perf_counter() - began)
                else:
                    seen.other.append(str(response.status))
                return []
            async for line in response.content:
                if line.startswith(b'data: {"error"'):
                    seen.other.append(line.decode()[:200])
                elif line.startswith(b"data: {"):
                    times.append(time.perf_counter())
        if times:
            seen.first.append(times[0] - began)
        return times

    async def poisson(self, rate: float, seconds: float, seed: int) -> tuple[Seen, float]:
        """What requests saw that arrived at `rate` per second, and answers per second until the last one ended."""
        seen, chance, tasks = Seen(), random.Random(seed), []
        began = due = time.perf_counter()
        while (due := due + chance.expovariate(rate)) < began + seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(self.ask(seen)))
        await asyncio.gather(*tasks)
        return seen, len(seen.first) / (time.perf_counter() - began)


async def capacity(asker: Asker, seconds: float) -> float:
    """Answers per second of clients that always have a request open."""
    seen, end = Seen(), time.perf_counter() + seconds

    async def client() -> None:
        while time.perf_counter() < end:
            await asker.ask(seen)

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return len(seen.first) / (time.perf_counter() - began)


async def beside_grammars(asker: Asker, other: Asker) -> float:
    """The longest time between events of a stream while hostile grammars are compiled for others."""
    gaps: list[float] = []

    async def listen() -> None:
        times = await asker.ask(Seen(), max_tokens=3000)
        gaps.extend(later - earlier for earlier, later in itertools.pairwise(times))

    listener = asyncio.create_task(listen())
    await asyncio.sleep(0.2)
    for number in range(12):
        schema = {**HOSTILE[number % len(HOSTILE)], "title": f"new {number}"}
        await other.ask(Seen(), structured_outputs={"json": schema}, max_tokens=4)
    await listener
    return max(gaps)


async def measure(url: str, keys: dict[str, str], seconds: float) -> tuple[list[dict[str, Any]], list[Bar]]:
    gc.collect()
    gc.disable()  # the clients' own collections would count as the server's time
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=600)) as session:
        quiet, noisy = (Asker(session, url, keys[name]) for name in ("quiet", "noisy"))
        await capacity(noisy, 3)
        most = await capacity(noisy, seconds)
        rows: list[dict[str, Any]] = [{"load": "closed, 16 clients", "answers_s": most}]
        answered: dict[float, float] = {}
        sheds = 0.0
        for share in (0.5, 0.9, 1.5):
            length = seconds * (OVERLOAD_SECONDS if share > 1 else 1)
            seen, answered[share] = await noisy.poisson(share * most, length, seed=int(10 * share))
            sheds = max(seen.refused, default=0.0)
            rows.append(
                {"load": f"{share} of capacity", "answers_s": answered[share], "refused": len(seen.refused),
                 "other": len(seen.other),
                 "refusal_ms_p50": 1e3 * _percentile(seen.refused, 0.5),
                 "refusal_ms_p99": 1e3 * _percentile(seen.refused, 0.99), "longest_refusal_ms": 1e3 * sheds,
                 "first_token_ms_p50": 1e3 * seen.percentile(0.5), "first_token_ms_p95": 1e3 * seen.percentile(0.95)}
            )  # fmt: skip
        rate = 0.07 * most  # with ten times as much from another key: 0.77 of the capacity
        alone, _ = await quiet.poisson(rate, seconds, seed=1)
        (beside, _), (loud, _) = await asyncio.gather(
            quiet.poisson(rate, seconds, seed=1), noisy.poisson(10 * rate, seconds, seed=2)
        )
        for who, seen in (("quiet key, alone", alone), ("beside a noisy one", beside), ("the noisy key", loud)):
            rows.append(
                {"load": who, "requests": len(seen.first), "first_token_ms_p50": 1e3 * seen.percentile(0.5),
                 "first_token_ms_p95": 1e3 * seen.percentile(0.95)}
            )  # fmt: skip
        gap = await beside_grammars(quiet, noisy)
    bars = [
        Bar("answers/s at 1.5 of the capacity, of those at 0.9", answered[1.5] / answered[0.9], 0.95, "higher"),
        Bar("longest refusal at 1.5 of the capacity, ms", 1e3 * sheds, 50, "lower"),
        Bar("p95 of the first token beside a key that sends 10x, of that alone",
            beside.percentile(0.95) / alone.percentile(0.95), 1.3, "lower"),
        Bar("longest gap of a stream while grammars are compiled, ms", 1e3 * gap, 50, "lower"),
    ]  # fmt: skip
    return rows, bars


def main(seconds: float) -> int:
    from moray.cluster.embedded import EmbeddedCluster
    from moray.pipelines.serve.session import open_session
    from moray.platform.core.api_keys import add_key, served_keys
    from moray.platform.core.home import Home

    with tempfile.TemporaryDirectory() as folder:
        os.environ["MORAY_HOME"] = str(Path(folder) / "home")
        home = Home.from_environment()
        make_model(Path(folder) / "model")
        keys = {name: add_key(home, name)[1] for name in ("quiet", "noisy")}
        cluster = EmbeddedCluster(home)
        cluster.ensure()
        try:
            session = open_session(Path(folder) / "model", "model", keys=served_keys(home))
            rows, bars = asyncio.run(measure(session.url, keys, seconds))
            session.stop()
        finally:
            cluster.stop()
    return report("serving_load", rows, bars, MEASURES)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) if len(sys.argv) > 1 else 20.0))
