"""One pool of spawned processes for everything that needs ranks: started in a test run when needed, and used again.

A job is a function of a module under tests/, which every rank calls with the same arguments inside a fresh gloo process
group. It runs on the first `world` ranks of the pool.
"""

from __future__ import annotations

import importlib
import multiprocessing
import multiprocessing.connection
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SECONDS = 240  # a job that takes longer hangs

_spawn = multiprocessing.get_context("spawn")


class RankPool:
    """Processes, each with torch imported and one thread, as many as a job has needed so far."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._jobs = 0
        self._ranks: list[tuple[Any, Connection]] = []

    def run(self, world: int, job: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `job(*arguments)` returned on each rank. Raises AssertionError with the first rank's traceback."""
        while len(self._ranks) < world:
            self._start()
        self._jobs += 1
        store = str(self._folder / f"store-{self._jobs}")
        waiting: dict[Connection, int] = {}
        for rank, (_, connection) in enumerate(self._ranks[:world]):
            connection.send((rank, world, store, job.__module__, job.__qualname__, arguments))
            waiting[connection] = rank
        results: dict[int, Any] = {}
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting), timeout=SECONDS)
            failure = None if ready else f"ranks {sorted(waiting.values())} hang"
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    failed, results[rank] = connection.recv()
                except EOFError:
                    failed, results[rank] = True, "its process ended"
                if failed:
                    failure = f"rank {rank} of {world}: {results[rank]}"
            if failure:
                self.stop()  # the other ranks wait for this one, for ever
                raise AssertionError(failure)
        return [results[rank] for rank in range(world)]

    def stop(self) -> None:
        for process, connection in self._ranks:
            process.kill()
            process.join()
            connection.close()
        self._ranks = []

    def _start(self) -> None:
        ours, theirs = _spawn.Pipe()
        process = _spawn.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        self._ranks.append((process, ours))


def _serve(connection: Connection) -> None:
    """A rank's life."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            rank, world, store, module, name, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send(
                (False, _run(rank, world, store, getattr(importlib.import_module(module), name), arguments))
            )
        except BaseException:
            connection.send((True, traceback.format_exc()))


def _run(rank: int, world: int, store: str, job: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    try:
        return job(*arguments)
    finally:
        dist.destroy_process_group()
