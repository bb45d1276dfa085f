"""Serving under faults: what others wait when one of two replicas dies, and memory over many requests.

Deaths: six clients keep asking for 300 ids, every second one as a stream. In each round a replica is killed, and a new
client asks for short answers from that moment. The wait is the longest whole answer among those that were being written
at that moment, which another replica may have to begin again, and all later ones. Every request must end: with an
answer, with 503, or as a stream with an error event.

Memory: eight clients ask for short answers. The resident set of each process of Ray Serve after 20,000 requests is
compared with that after 2,000; what the last 9,000 of 38,000 requests add says whether it goes on.

Usage: python benchmarks/serving_faults.py [deaths=5]
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from harness.result import Bar, report
from serving_http import ids, make_model

from moray.platform.api import serving
from moray.platform.core.serve_options import ServeOptions

CLIENTS = 6
TOKENS = 300
WARM = 2000  # requests
STRIDE = 9000  # requests between readings of memory
MEASURES = ("moray.pipelines.serve.application", "moray.pipelines.serve.gateway", "moray.pipelines.serve.openai_api")


def replicas() -> list[psutil.Process]:
    return [process for process, name in serving_processes().items() if name.startswith("replica")]


def serving_processes() -> dict[psutil.Process, str]:
    """The processes of Ray Serve on this machine, by name."""
    names = {"ray::ServeReplica": "replica", "ray::ProxyActor": "proxy", "ray::ServeController": "controller"}
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        title = (process.info["cmdline"] or [""])[0]
        if name := next((name for begin, name in names.items() if title.startswith(begin)), ""):
            found[process] = f"{name} {process.pid}"
    return found


async def ask(session: aiohttp.ClientSession, stream: bool, tokens: int = TOKENS) -> str:
    """The outcome of a request: `answer`, `503`, `error event`, or something that must not happen."""
    prompt = ids(1, time.monotonic_ns())
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": stream}
    try:
        async with session.post("/v1/completions", json=body) as response:
            text = (await response.read()).decode()
            if response.status != 200:
                return str(response.status)
    except (aiohttp.ClientError, TimeoutError) as error:
        return type(error).__name__
    if not stream:
        return "answer" if json.loads(text)["usage"]["completion_tokens"] == tokens else "half an answer"
    last = text.rstrip().splitlines()[-1]
    return "answer" if last.endswith("[DONE]") else "error event" if '"replica_lost"' in last else "half a stream"


async def deaths(session: aiohttp.ClientSession, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for round_ in range(rounds):
        found: list[tuple[float, float, str, bool]] = []  # begin, end, outcome, whether it streams
        ended = asyncio.Event()

        async def keep_asking(number: int, tokens: int, found: Any = found, ended: asyncio.Event = ended) -> None:
            while not ended.is_set():
                began = time.perf_counter()
                outcome = await ask(session, bool(number % 2), tokens)
                found.append((began, time.perf_counter(), outcome, bool(number % 2)))

        clients = [asyncio.create_task(keep_asking(number, TOKENS)) for number in range(CLIENTS)]
        await asyncio.sleep(1)
        before = replicas()
        before[round_ % 2].kill()
        killed = time.perf_counter()
        clients.append(asyncio.create_task(keep_asking(0, 4)))
        while len(set(replicas()) - {before[round_ % 2]}) < 2:
            await asyncio.sleep(0.1)
        replaced = time.perf_counter() - killed
        await asyncio.sleep(3)  # until it has loaded the model
        ended.set()
        await asyncio.gather(*clients)
        spanning = [end - begin for begin, end, _, streams in found if begin < killed < end and not streams]
        later = [end - begin for begin, end, *_ in found if begin >= killed]
        row = {
            "death": round_,
            "longest_asked_before_s": max(spanning, default=0.0),
            "longest_asked_after_s": max(later),
        }
        rows.append(row | {"new_process_s": replaced} | Counter(outcome for _, _, outcome, _ in found))
        print(rows[-1], flush=True)
    return rows


async def memory(session: aiohttp.ClientSession) -> list[dict[str, Any]]:
    async def some(count: int) -> None:
        for _ in range(count):
            if (outcome := await ask(session, False, 2)) != "answer":
                raise RuntimeError(outcome)

    sizes: dict[str, list[int]] = {}
    points = list(range(WARM, WARM + 4 * STRIDE + 1, STRIDE))
    for before, upto in itertools.pairwise([0, *points]):
        began = time.perf_counter()
        await asyncio.gather(*(some((upto - before) // 8) for _ in range(8)))
        print(f"{upto} requests, {(upto - before) / (time.perf_counter() - began):.0f} a second", flush=True)
        await asyncio.sleep(1)
        for process, name in serving_processes().items():
            sizes.setdefault(name, []).append(process.memory_info().rss)
    rows = [
        {"process": name, "after_requests": points, "rss": found, "growth": found[2] / found[0] - 1,
         "growth_later": found[-1] / found[-2] - 1}
        for name, found in sizes.items()
    ]  # fmt: skip
    print(*rows, sep="\n", flush=True)
    return rows


async def measure(url: str, rounds: int) -> tuple[list[dict[str, Any]], list[Bar]]:
    timeout = aiohttp.ClientTimeout(total=30)
    async with aiohttp.ClientSession(url, timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(ask(session, False) for _ in range(CLIENTS)))
        grown = await memory(session)
        died = await deaths(session, rounds)
    known = {
        "death",
        "longest_asked_before_s",
        "longest_asked_after_s",
        "new_process_s",
        "answer",
        "503",
        "error event",
    }
    waits = [max(row["longest_asked_before_s"], row["longest_asked_after_s"]) for row in died]
    bad = sum(value for row in died for key, value in row.items() if key not in known)
    bars = [
        Bar("longest wait for an answer after a death, s", max(waits), 3, "lower"),
        Bar("requests that ended in no way they should", bad, 0, "lower"),
        Bar("growth of the largest process between requests 2,000 and 20,000, %",
            100 * max(row["growth"] for row in grown), 2, "lower"),
    ]  # fmt: skip
    return [*grown, *died], bars


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "model")
        with serving(str(Path(folder) / "model"), port=0, cpus=4, options=ServeOptions(replicas=2)) as url:
            rows, bars = asyncio.run(measure(url, rounds))
    return report("serving_faults", rows, bars, MEASURES)


if __name__ == "__main__":
    sys.exit(main())
