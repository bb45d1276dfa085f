"""Data-loading workers: Ray actors that own the token shards and hand packed batches to training ranks.

A rank asks for its slots of a step; what it gets depends on nothing but (seed, mixture, step, slots), so any worker
can answer any rank, and one that died is replaced by starting another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moray.actors.data.batch_plan import BatchPlan
from moray.actors.data.mixture import Mixture
from moray.actors.data.token_set import Batch, open_token_sets


class DataWorker:
    """Serves batches from the token sets under a folder or an `s3://` address. Wrapped as a Ray actor below."""

    def __init__(self, address: str, weights: Mapping[str, float], seed: int, plan: BatchPlan) -> None:
        self._sets = open_token_sets(address)
        self._mixture = Mixture({name: s.sequences for name, s in self._sets.items()}, weights, seed, plan)

    def batch(self, step: int, start: int, stop: int) -> Batch:
        """Slots [start, stop) of the global batch of `step`, in slot order."""
        sources, numbers = self._mixture.batch(step, start, stop)
        length = next(iter(self._sets.values())).sequence_length
        shape = (stop - start, length)
        batch = Batch(np.empty(shape, np.int64), np.empty(shape, np.int32), np.empty(shape, np.bool_))
        for source in np.unique(sources):
            rows = sources == source
            part = self._sets[self._mixture.sources[source]].batch(numbers[rows].tolist())
            batch.ids[rows], batch.documents[rows], batch.mask[rows] = part.ids, part.documents, part.mask
        return batch


CALL_RETRIES = 20  # of one call: an actor that dies of it each time is not restarted for ever


def start_data_workers(count: int, address: str, weights: Mapping[str, float], seed: int, plan: BatchPlan) -> list[Any]:
    """Starts `count` DataWorker actors. They take no CPU of the cluster's count, so that a small machine can
    schedule them beside the training workers; one that dies is restarted, and its calls are retried."""
    import ray

    # num_cpus must be given: an actor without it takes one CPU to be placed.
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=CALL_RETRIES)(DataWorker)
    return [actor.remote(address, dict(weights), seed, plan) for _ in range(count)]
