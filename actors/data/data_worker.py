"""Data workers: Ray actors that read token shards and serve packed batches to training ranks.

A rank requests its slots of a step. The result depends only on (seed, mixture, step, slots), so any worker can serve
any rank, and a new worker can replace one that died.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moray.actors.data.batch_plan import BatchPlan
from moray.actors.data.held_out import HeldOutPlan
from moray.actors.data.mixture import Mixture
from moray.actors.data.token_set import StoredSequences, TokenSet, open_token_sets


class DataWorker:
    """Serves batches from the token sets under a folder or an `s3://` address. Runs as a Ray actor."""

    def __init__(self, address: str, weights: Mapping[str, float], seed: int, plan: BatchPlan) -> None:
        self._sets = open_token_sets(address, check=False)  # once for all workers, before they start
        self._held_out: dict[str, dict[str, TokenSet]] = {}  # by address
        self._mixture = Mixture({name: s.sequences for name, s in self._sets.items()}, weights, seed, plan)

    def batch(self, step: int, start: int, stop: int) -> StoredSequences:
        """Slots [start, stop) of the global batch of `step`, in slot order."""
        return _stored(self._sets, self._mixture.sources, *self._mixture.batch(step, start, stop))

    def held_out(self, plan: HeldOutPlan, start: int, stop: int) -> StoredSequences:
        """Slots [start, stop) of the plan, whose sources have the indices of `plan.sources`."""
        if plan.address not in self._held_out:
            self._held_out[plan.address] = open_token_sets(plan.address, check=False)
        return _stored(self._held_out[plan.address], plan.sources, *plan.sequences(start, stop))


def _stored(
    sets: Mapping[str, TokenSet],
    names: Sequence[str],
    sources: npt.NDArray[np.int64],
    numbers: npt.NDArray[np.int64],
) -> StoredSequences:
    """The sequences with these numbers in their sources, whose names are `names[source]`."""
    first = next(iter(sets.values()))
    vocabulary = first.vocabulary
    ids = np.empty((len(sources), first.sequence_length), vocabulary.dtype)
    for source in np.unique(sources):
        rows = sources == source
        ids[rows] = sets[names[source]].stored(numbers[rows].tolist())
    return StoredSequences(ids, vocabulary.eos, vocabulary.pad, sources.astype(np.int32))


CALL_RETRIES = 20  # of one call, so that a call that kills the actor does not restart it indefinitely


def start_data_workers(count: int, address: str, weights: Mapping[str, float], seed: int, plan: BatchPlan) -> list[Any]:
    """Starts `count` DataWorker actors. Ray restarts an actor that died and retries its calls.

    They reserve no CPU, so that a small machine can schedule them beside the training workers.
    """
    import ray

    # Without num_cpus, Ray would reserve one CPU to place each actor.
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=CALL_RETRIES)(DataWorker)
    return [actor.remote(address, dict(weights), seed, plan) for _ in range(count)]
