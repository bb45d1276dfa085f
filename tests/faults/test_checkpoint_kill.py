"""SIGKILL at random instants of saves: the last checkpoint that was reported whole is never lost, and it is right.

Fifty kills are evidence; `make test` has a few.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import random
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from moray.pipelines.pretrain.checkpoint import checkpoint_files
from moray.pipelines.pretrain.worker import Worker
from tests.pipelines.pretrain.training_ranks import lone_worker, state_of, steps

# Children are forked from a process that has imported torch and done nothing else.
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["tests.pipelines.pretrain.training_ranks"])
SECONDS = 60.0
LONG = 100_000  # steps, as far as schedules are concerned


def digest(worker: Worker) -> str:
    return hashlib.sha256(repr(sorted(state_of(worker).items())).encode()).hexdigest()


def train_and_save(folder: str, connection: Connection) -> None:
    """Goes on from the newest checkpoint, tells where and with what, then saves after every step, for ever."""
    torch.set_num_threads(1)
    worker = lone_worker(folder, steps=LONG)
    restored = worker.checkpoints.restore(worker.state)
    connection.send((restored.steps, digest(worker), restored.warnings))
    at = restored.steps
    while True:
        list(steps(worker, at, at + 1))
        at += 1
        worker.checkpoints.save(worker.state, at, worker.tokens_before(at))
        for saved in worker.checkpoints.ended():
            connection.send((saved.steps, saved.error))


def undisturbed(folder: Path) -> Iterator[str]:
    """The digest after every number of steps from 0 on."""
    torch.set_num_threads(1)  # as in the children: sums depend on it
    worker = lone_worker(str(folder), steps=LONG)
    at = 0
    while True:
        yield digest(worker)
        list(steps(worker, at, at + 1))
        at += 1


def messages_left(connection: Connection) -> Iterator[int]:
    """The saves of which a process that is gone had still said that they are whole."""
    try:
        while True:
            at, error = connection.recv()
            assert error == ""
            yield at
    except EOFError:
        connection.close()


@pytest.mark.heavy
@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.evidence)])
def test_a_kill_at_any_instant_of_a_save_loses_nothing_that_was_saved(tmp_path: Path, kills: int) -> None:
    chance = random.Random(kills)
    expected, known = undisturbed(tmp_path / "undisturbed"), list[str]()
    last, unfinished = 0, 0
    for _ in range(kills):
        ours, theirs = _server.Pipe()
        child = _server.Process(target=train_and_save, args=(str(tmp_path / "run"), theirs))
        child.start()
        theirs.close()
        assert ours.poll(SECONDS), "no worker"
        at, found, said = ours.recv()
        assert at >= last, "a checkpoint that was reported whole is lost"
        assert said == (), "a whole checkpoint is damaged"
        for _ in range(chance.randrange(1, 4)):
            assert ours.poll(SECONDS), "no save"
            last, error = ours.recv()
            assert error == ""
        child.join(chance.uniform(0, 0.1))
        child.kill()
        child.join()
        last = max([last, *messages_left(ours)])
        while len(known) <= at:
            known.append(next(expected))
        assert found == known[at]
        unfinished += bool(list((tmp_path / "run" / "checkpoints").glob(".step-*")))
    assert checkpoint_files.complete_steps(tmp_path / "run" / "checkpoints")[-1] >= last >= kills
    assert unfinished > kills // 4, "too few of the kills were within a save"
