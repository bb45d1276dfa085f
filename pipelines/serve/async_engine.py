"""asyncio interface of the engine: one thread runs its steps, and any number of coroutines wait for answers.

Notable: only the engine's thread touches the engine. Coroutines post commands to an inbox that the thread reads between
steps, so no coroutine waits for a lock while the model runs. A slow consumer receives all results since its last read
in one list, so slow clients get fewer and larger chunks.
"""

from __future__ import annotations

import gc
import queue
import threading
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any

import torch

from moray.pipelines.serve.engine import Engine, Output
from moray.pipelines.serve.sequence import Delta, Request
from moray.pipelines.serve.sequence import Sequence as Answer
from moray.pipelines.serve.streams import AnswerStream, Delivery, seconds_apart


class EngineStoppedError(RuntimeError):
    """The engine has stopped or was never started."""


class QueueFullError(RuntimeError):
    """The engine has as many open requests as it takes. entirely: whether there is not even room for one answer."""

    def __init__(self, message: str, entirely: bool = False) -> None:
        super().__init__(message)
        self.entirely = entirely


class Reservation:
    """Room for requests in the engine's queue, until it is released."""

    def __init__(self, release: Callable[[], None] | None = None) -> None:
        self._release = release

    def release(self) -> None:
        """Does nothing the second time."""
        release, self._release = self._release, None
        if release is not None:
            release()


class AsyncEngine:
    """Owns an engine and its thread. threads: number of threads that torch may use for one operation. most_open:
    answers that may be open at a time.

    The default is one thread, because on a shared machine two threads that wait for each other are slower: beside
    another busy process on two cores, a tiny model's decode step took 4 ms with one thread and 300 ms with two.
    """

    def __init__(self, engine: Engine, threads: int = 1, most_open: int = 1024) -> None:
        self.engine = engine
        self._threads = threads
        self._most_open = most_open
        self._open = 0
        self._by_tenant: Counter[str] = Counter()
        self._delivery = Delivery()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._streams: dict[Answer, tuple[AnswerStream, int]] = {}
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._gate = threading.Lock()
        self._closed = True

    def start(self) -> None:
        gc.collect()
        gc.freeze()  # a collection of everything that was loaded takes as long as many steps
        self._closed = False
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its current step. Unfinished answers end with EngineStoppedError."""
        with self._gate:
            self._closed = True
            self._inbox.put(None)
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the engine accepts requests."""
        return self._thread.is_alive() and not self._closed

    @property
    def failed(self) -> bool:
        """Whether the engine's thread has ended without being stopped."""
        return not self._closed and not self._thread.is_alive()

    @property
    def tokens_in_flight(self) -> int:
        """Ids that all open requests still read or write. Called from any thread."""
        return sum(one.tokens_left for one in self.engine.sequences)

    def state(self) -> dict[str, Any]:
        """What the engine does now, for reports. Called from any thread; the numbers may be a step apart."""
        engine = self.engine
        return {
            "running": len(engine.running),
            "waiting": len(engine.sequences) - len(engine.running),
            "cache": round(1 - engine.pool.blocks_free / engine.pool.blocks, 4),
            "expert_load": engine.expert_load(),
        }

    def reserve(self, requests: Sequence[Request]) -> Reservation:
        """Counts these requests as open until the reservation is released, so that they will have room. Raises
        QueueFullError if there is none. A tenant may have three quarters of all."""
        return self.reserve_room(requests[0].tenant if requests else "", len(requests))

    def reserve_room(self, tenant: str, answers: int) -> Reservation:
        """Counts so many answers of a tenant as open, as `reserve` does."""
        self._check_room(tenant, answers)
        self._count(tenant, answers)
        return Reservation(lambda: self._count(tenant, -answers))

    def _check_room(self, tenant: str, answers: int) -> None:
        mine, most = self._by_tenant.get(tenant, 0), self._most_open
        if self._open + answers > most:
            message = f"the server has {self._open} open requests, of up to {most}; try later"
            raise QueueFullError(message, self._open >= most)
        if tenant and mine + answers > (share := most - most // 4):
            raise QueueFullError(f"this key has {mine} open requests, of up to {share}; try later", mine >= share)

    def _count(self, tenant: str, answers: int) -> None:
        self._open += answers
        self._by_tenant[tenant] += answers
        if not self._by_tenant[tenant]:
            del self._by_tenant[tenant]

    async def generate(self, request: Request) -> AsyncIterator[Delta]:
        """Yields the answer's deltas. Leaving the iterator early cancels the request. Raises the request's error."""
        async with aclosing(self.generate_many([request])) as answers:
            async for items in answers:
                for _, delta in items:
                    yield delta

    async def generate_many(
        self, requests: Sequence[Request], reserved: bool = False
    ) -> AsyncGenerator[list[tuple[int, Delta]], None]:
        """Yields the deltas of several requests, in lists of (index of the request, delta).

        reserved: whether the caller has reserved room for them. Raises ValueError if one of the requests is invalid,
        QueueFullError if there is no room for all of them. The failure of one ends the others.
        """
        reservation = Reservation() if reserved else self.reserve(requests)
        stream = AnswerStream()
        left = 0
        try:
            with self._gate:  # no command may follow the final None in the inbox
                if not self.alive:
                    raise EngineStoppedError("the engine is not running")
                self._inbox.put(lambda: self._admit(stream, requests))
            left = len(requests)
            while left:
                items = await stream.take(seconds_apart(self._open))
                deltas = [(index, _unless_error(result)) for index, result in items]
                left -= sum(delta.finish_reason is not None for _, delta in deltas)
                yield deltas
        finally:
            reservation.release()
            if left:
                self._inbox.put(lambda: self._cancel(stream))

    def _work(self) -> None:
        torch.set_num_threads(self._threads)
        try:
            while self._turn():
                pass
        finally:
            self._abort(EngineStoppedError("the engine is shutting down"))

    def _turn(self) -> bool:
        """Runs the posted commands and a step. Returns False at the end."""
        try:
            for command in self._commands():
                if command is None:
                    return False
                command()
            self._deliver(self.engine.step())
        except Exception as error:  # a bug: fails the current requests, but later ones must still be answered
            self._abort(error)
        return True

    def _commands(self) -> list[Callable[[], None] | None]:
        """All posted commands. Waits for one if the engine is idle."""
        commands = [] if self.engine.busy else [self._inbox.get()]
        while not self._inbox.empty():
            commands.append(self._inbox.get())
        return commands

    def _admit(self, stream: AnswerStream, requests: Sequence[Request]) -> None:
        """Requests with the prompt of the one before let the first of them read it."""
        leader: Answer | None = None
        for index, request in enumerate(requests):
            if leader is not None and (request.prompt, request.bare) != (leader.request.prompt, leader.request.bare):
                leader = None
            try:
                answer = self.engine.submit(request, None if request.echo and request.logprobs is not None else leader)
            except Exception as error:
                self._cancel(stream)
                self._delivery.add(stream, (index, error))
                return
            leader = leader or answer
            stream.answers.append(answer)
            self._streams[answer] = (stream, index)

    def _cancel(self, stream: AnswerStream) -> None:
        for answer in stream.answers:
            self.engine.cancel(answer)
            self._streams.pop(answer, None)

    def _abort(self, error: Exception) -> None:
        """Ends all unfinished requests with `error`, also those that the engine has just forgotten."""
        answers = list(dict.fromkeys([*self._streams, *self.engine.sequences]))
        for answer in answers:
            self.engine.cancel(answer)
        self._deliver([Output(answer, error) for answer in answers])

    def _deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            ended = isinstance(output.result, Exception) or output.result.finish_reason is not None
            found = self._streams.pop(output.sequence, None) if ended else self._streams.get(output.sequence)
            if found is not None:
                stream, index = found
                self._delivery.add(stream, (index, output.result))
        for stream in self._delivery.send():
            self._cancel(stream)


def _unless_error(result: Delta | Exception) -> Delta:
    if isinstance(result, Exception):
        raise result
    return result
