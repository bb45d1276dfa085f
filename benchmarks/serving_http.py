"""Serving over HTTP: what Ray Serve adds to the engine, and what other requests do to a well-behaved stream.

One replica serves a model of the size of the quickstart's, with random weights, as `moray serve` does. Clients in one
asyncio process stream greedy answers. The engine alone runs in another process without HTTP; rounds of both take turns.
Each attack, from a process of its own, runs beside a stream of its own. The longest time between two of the stream's
events counts, from before the attack until it has been answered.

Usage: python benchmarks/serving_http.py [rounds=5]
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from harness.result import Bar, report

CLIENTS, PROMPT, NEW = 8, 64, 1000
CONTEXT, VOCABULARY = 4096, 4096
MEASURES = ("moray.pipelines.serve.application", "moray.pipelines.serve.gateway", "moray.pipelines.serve.openai_api")


def make_model(folder: Path) -> None:
    import dataclasses

    from transformers import PreTrainedTokenizerFast

    from moray.models import checkpoint
    from moray.models.model import DeepseekV3
    from moray.models.presets import preset
    from moray.pipelines.tokenizer.train import TokenizerConfig, train_tokenizer

    config = dataclasses.replace(preset("tiny"), max_position_embeddings=CONTEXT, initializer_range=0.1)
    model = DeepseekV3(config)
    model.init_weights(seed=1)
    checkpoint.save(model, folder)
    text = "the quick brown fox jumps over the lazy dog\n"
    tokenizer = train_tokenizer(iter([text] * 4), TokenizerConfig(vocab_size=300))
    tokenizer.add_tokens([f"<{index}>" for index in range(VOCABULARY - tokenizer.get_vocab_size())])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def engine_alone(folder: str, pipe: Connection) -> None:
    """Answers (seconds to the first token, tokens per second) for each number of clients that it is sent."""
    from moray.pipelines.serve.loading import load_engine
    from moray.pipelines.serve.sequence import Request
    from moray.platform.core.serve_options import ServeOptions

    engine = load_engine(Path(folder), ServeOptions())
    while (clients := pipe.recv()) is not None:
        began = time.perf_counter()
        for number in range(clients):
            request = Request(tuple(ids(number, time.monotonic_ns())), NEW, temperature=0.0, ignore_eos=True)
            engine.submit(request)
        engine.step()
        first = time.perf_counter()
        while engine.busy:
            engine.step()
        pipe.send((first - began, clients * (NEW - 1) / (time.perf_counter() - first)))


def ids(number: int, salt: int, count: int = PROMPT) -> list[int]:
    """A prompt that no other request shares."""
    return [300 + (salt * 31 + number * 977 + place * (salt % 89 + 7)) % (VOCABULARY - 300) for place in range(count)]


class Client:
    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session, self.url = session, url
        self._url = f"{url}/v1/completions"

    async def stream(self, prompt: Any, tokens: int = NEW, **options: Any) -> AsyncGenerator[float, None]:
        """The times of the events of an answer. Raises RuntimeError for an answer that is no stream."""
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True, **options}
        async with self._session.post(self._url, json=body) as response:
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {(await response.text())[:200]}")
            async for line in response.content:
                if line.startswith(b"data: {"):
                    if b'"error"' in line:
                        raise RuntimeError(line.decode())
                    yield time.perf_counter()

    async def status(self, body: Any) -> tuple[int, float]:
        """The status and the seconds of a request with a body, as bytes or chunks of bytes."""
        began = time.perf_counter()
        headers = {"content-type": "application/json"}
        with contextlib.suppress(aiohttp.ClientError):
            async with self._session.post(self._url, data=body, headers=headers) as response:
                await response.read()
                return response.status, time.perf_counter() - began
        return 0, time.perf_counter() - began


async def first_token(client: Client, prompt: list[int]) -> float:
    began = time.perf_counter()
    async for at in client.stream(prompt, 2):
        return at - began
    raise RuntimeError("no event")


async def together(client: Client, clients: int) -> tuple[float, float]:
    """(median seconds to the first token, tokens per second) of so many streams at the same time."""
    began, salt = time.perf_counter(), time.monotonic_ns()

    async def one(number: int) -> list[float]:
        return [at async for at in client.stream(ids(number, salt))]

    times = await asyncio.gather(*(one(number) for number in range(clients)))
    firsts = [found[0] - began for found in times]
    last = max(found[-1] for found in times)
    return statistics.median(firsts), clients * (NEW - 1) / (last - statistics.median(found[0] for found in times))


async def beside(client: Client, attack: Callable[[], Awaitable[Any]]) -> tuple[float, int, Any]:
    """The longest time between two events of a stream while the attack runs, the rise of memory, and the attack's
    result."""
    done = asyncio.Event()
    gaps: list[float] = []

    async def listen() -> None:
        salt = 0
        while not done.is_set():
            salt += 1
            last: float | None = None
            async for at in client.stream(ids(salt, time.monotonic_ns()), 1000):
                if last is not None:
                    gaps.append(at - last)
                last = at
                if done.is_set():
                    return

    listener = asyncio.create_task(listen())
    while len(gaps) < 50:
        await asyncio.sleep(0.01)
    with Memory() as memory:
        result = await attack()
        await asyncio.sleep(0.5)
    done.set()
    await listener
    return max(gaps), memory.rise, result


async def drain(answer: AsyncIterator[float]) -> None:
    async for _ in answer:
        pass


async def refused(client: Client) -> tuple[float, int]:
    """The longest of 20 refusals while the queue is full, in seconds, and how many of them had status 429."""
    salt = time.monotonic_ns()
    answers = [client.stream(ids(n, salt), 1000, n=128) for n in range(8)]  # 1,024 of them
    await asyncio.gather(*(anext(answer) for answer in answers))
    body = json.dumps({"prompt": ids(1, salt), "max_tokens": 1}).encode()
    found = [await client.status(body) for _ in range(20)]
    await asyncio.gather(*(answer.aclose() for answer in answers))
    return max(seconds for _, seconds in found), sum(status == 429 for status, _ in found)


async def many_streams(client: Client, streams: int, tokens: int) -> tuple[float, float]:
    """(95th percentile of the times between events, the slowest stream's rate over the median)."""
    salt = time.monotonic_ns()

    async def one(number: int) -> list[float]:
        return [at async for at in client.stream(ids(number, salt), tokens)]

    times = await asyncio.gather(*(one(number) for number in range(streams)))
    gaps = sorted(later - earlier for found in times for earlier, later in itertools.pairwise(found))
    rates = [1 / (found[-1] - found[0]) for found in times]
    return gaps[int(0.95 * len(gaps))], min(rates) / statistics.median(rates)


def serving_processes() -> dict[str, psutil.Process]:
    """The replica, the proxy and this client."""
    found = {"client": psutil.Process()}
    for process in psutil.process_iter(["cmdline"]):
        title = (process.info["cmdline"] or [""])[0]
        for begin, name in (("ray::ServeReplica", "replica"), ("ray::ProxyActor", "proxy")):
            if title.startswith(begin):
                found[name] = process
    return found


def cpu_seconds() -> dict[str, float]:
    times = {name: process.cpu_times() for name, process in serving_processes().items()}
    return {name: found.user + found.system for name, found in times.items()}


class Memory:
    """The memory of proxy and replica together, sampled by a thread while the block runs. rise: bytes, at its peak."""

    def __init__(self) -> None:
        self.rise = 0
        self._ended = threading.Event()
        found = serving_processes()
        self._processes = [found["replica"], found["proxy"]]

    def __enter__(self) -> Memory:
        self._before = self._now()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _now(self) -> int:
        return sum(process.memory_info().rss for process in self._processes)

    def _sample(self) -> None:
        while not self._ended.wait(0.01):
            self.rise = max(self.rise, self._now() - self._before)


async def chunks() -> AsyncIterator[bytes]:
    yield b'{"prompt": "'
    for _ in range(100):
        yield b"x" * 1_000_000


# A model of 4,096 positions accepts 1 MiB and 65,536 ids; what is above is refused before it is parsed.
BODIES: dict[str, Callable[[], Any]] = {
    "a body of 100 MB": lambda: b'{"prompt": "' + b"x" * 100_000_000 + b'"}',
    "a body of 100 MB in chunks": chunks,
    "5 million ids": lambda: json.dumps({"prompt": [5] * 5_000_000}).encode(),
    "60,000 ids": lambda: b'{"prompt": [' + b"5," * 60_000 + b"5]}",
    "10,000 prompts": lambda: json.dumps({"prompt": ["x"] * 10_000}).encode(),
    "a prompt of the whole context": lambda: json.dumps({"prompt": ids(3, 5, CONTEXT - 8), "max_tokens": 4}).encode(),
}


STATUS = {"10,000 prompts": 400, "60,000 ids": 400, "a prompt of the whole context": 200}  # else 413


async def elsewhere(url: str, name: str) -> str:
    """The status and the seconds of a request with this body, from a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    made = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "--send", url, name, stdout=asyncio.subprocess.PIPE, env=environment
    )
    printed, _ = await made.communicate()
    if not printed.decode().startswith(f"({STATUS.get(name, 413)},"):
        raise RuntimeError(f"{name}: {printed.decode()!r}")
    return printed.decode().strip()


async def send(url: str, name: str) -> None:
    async with aiohttp.ClientSession() as session:
        print(await Client(session, url).status(BODIES[name]()))


async def attacks(client: Client) -> list[dict[str, Any]]:
    async def long_answers() -> list[float]:
        salt = time.monotonic_ns()
        answers = [client.stream(ids(n, salt), 400) for n in range(66)]
        await asyncio.gather(*(anext(answer) for answer in answers))
        rest = asyncio.gather(*(drain(answer) for answer in answers))
        short = await first_token(client, ids(1, time.monotonic_ns(), 2))
        await rest
        return [short]

    async def nothing() -> None:
        await asyncio.sleep(2)

    named: dict[str, Callable[[], Awaitable[Any]]] = {
        "none": nothing,
        **{name: partial(elsewhere, client.url, name) for name in BODIES},
        "66 answers of 400 ids, and a short one": long_answers,
    }
    rows = []
    for name, attack in named.items():
        gap, memory, result = await beside(client, attack)
        row = {"attack": name, "longest_gap_ms": 1e3 * gap, "rss_rise": memory, "result": str(result)}
        rows.append(row)
        print(row, flush=True)
    return rows


async def measure(url: str, engine: Connection, rounds: int) -> tuple[list[dict[str, Any]], list[Bar]]:
    timeout = aiohttp.ClientTimeout(total=300)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector, read_bufsize=1 << 20) as session:
        client = Client(session, url)
        await together(client, CLIENTS)
        found: dict[tuple[str, int], list[tuple[float, float]]] = {}
        spent = Counter[tuple[str, int]]()
        for _ in range(rounds):
            for clients in (1, CLIENTS):
                engine.send(clients)
                alone = await asyncio.to_thread(engine.recv)
                found.setdefault(("engine", clients), []).append(alone)
                before = cpu_seconds()
                found.setdefault(("Serve", clients), []).append(await together(client, clients))
                spent.update({(who, clients): used - before[who] for who, used in cpu_seconds().items()})
        rows: list[dict[str, Any]] = [
            {"who": who, "clients": clients, "first_token_ms": 1e3 * statistics.median(first for first, _ in pairs),
             "tokens_s": statistics.median(rate for _, rate in pairs)}
            for (who, clients), pairs in found.items()
        ]  # fmt: skip
        rows += [
            {"cpu_of": who, "clients": clients, "ms_per_1000_ids": 1e6 * used / (rounds * clients * NEW)}
            for (who, clients), used in sorted(spent.items())
        ]
        prefixes = []
        for number in range(rounds):
            prompt = ids(number, time.monotonic_ns(), 2000)
            prefixes.append([await first_token(client, [*prompt, 7]), await first_token(client, [*prompt, 8])])
        ratio = statistics.median(again / first for first, again in prefixes)
        rows.append({"who": "a shared prefix of 2,000 ids", "first_token_ms": 1e3 * prefixes[-1][0], "again": ratio})
        flood = await attacks(client)
        async with session.get(f"{url}/v1/models") as response:
            limit = (await response.json())["data"][0]["max_body_bytes"]
        rows.append({"who": "the limit of a body", "bytes": limit})
        p95, slowest = await many_streams(client, 300, 64)
        longest, count = await refused(client)
        rows.append({"who": "20 requests to a full queue", "longest_ms": 1e3 * longest, "status_429": count})
        rows += [*flood, {"who": "300 streams", "p95_gap_ms": 1e3 * p95, "slowest_over_median": slowest}]
    at = {(row["who"], row.get("clients")): row for row in rows if "who" in row}
    added = at["Serve", 1]["first_token_ms"] - at["engine", 1]["first_token_ms"]
    share = at["Serve", CLIENTS]["tokens_s"] / at["engine", CLIENTS]["tokens_s"]
    bars = [
        Bar("tokens/s through Serve at 8 clients, of the engine's", share, 0.92, "higher"),
        Bar("time to the first token that Serve adds at 1 client, ms", added, 5, "lower"),
        Bar("a second request on a prefix of 2,000 ids, time to the first token", ratio, 0.1, "lower"),
        *(Bar(f"longest gap beside {row['attack']}, ms", row["longest_gap_ms"], 100, "lower") for row in flood[1:]),
        Bar("95th percentile of gaps of 300 streams, ms", 1e3 * p95, 300, "lower"),
        Bar("slowest of 300 streams over the median", slowest, 0.5, "higher"),
        Bar(
            "rise of the memory of proxy and replica beside a large body, over its limit",
            max(row["rss_rise"] for row in flood if row["attack"] in BODIES) / limit,
            3,
            "lower",
        ),
    ]
    bars += [
        Bar("longest refusal of a full queue, ms", 1e3 * longest, 50, "lower"),
        Bar("of 20 requests to a full queue, refused", count, 20, "higher"),
    ]
    return rows, bars


def main() -> int:
    from moray.platform.api import serving

    if sys.argv[1:2] == ["--send"]:
        asyncio.run(send(*sys.argv[2:4]))
        return 0
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "model")
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        engine = spawn.Process(target=engine_alone, args=(str(Path(folder) / "model"), theirs), daemon=True)
        engine.start()
        with serving(str(Path(folder) / "model"), port=0) as url:
            rows, bars = asyncio.run(measure(url, ours, rounds))
        ours.send(None)
        engine.join()
    return report("serving_http", rows, bars, MEASURES)


if __name__ == "__main__":
    sys.exit(main())
