"""The driver of a drill: trains a toy model under Ray Train, on a cluster that somebody else started.

Usage: python -m tests.faults.drill FOLDER SETTINGS, where SETTINGS are pretrain's, as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from moray.actors.data.token_set import open_token_sets
from moray.pipelines.pretrain.config import TrainingJob
from moray.pipelines.pretrain.trainer import fit
from moray.platform.core.cluster import Topology
from tests.actors.data.test_token_set import LENGTH, write
from tests.pipelines.pretrain.settings import pretrain_config
from tests.pipelines.pretrain.training_ranks import MODEL


def main(folder: Path, settings: str) -> None:
    import ray

    ray.init(log_to_driver=False)
    tokens = folder / "tokens"
    if not tokens.exists():
        write(tokens / "a", [[[(3 * i + k) % 997 + 3 for i in range(60)] for k in range(200)]])
    vocabulary = open_token_sets(str(tokens))["a"].vocabulary
    config = pretrain_config(**json.loads(settings))
    model = dataclasses.replace(MODEL, vocab_size=vocabulary.size, max_position_embeddings=LENGTH)
    job = TrainingJob(config, model, LENGTH, str(folder / "run"), str(folder / "events"), "pretrain", threads=1)
    cpus = int(ray.cluster_resources()["CPU"])
    fit(job, str(tokens), str(folder / "train"), Topology(cpus=cpus, gpus=0, memory_bytes=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
