"""Held-out windows of a trained model's own token set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moray.actors.data.token_set import open_token_sets
from moray.pipelines.evaluate.step import heldout_documents, split_windows
from moray.platform.store.artifacts import Artifact, ArtifactStore
from moray.platform.store.search import find_artifact

WINDOWS = 16


def model_and_training(store: ArtifactStore, name: str) -> tuple[Artifact, Artifact]:
    """The artifacts of a model, by alias or reference, and of the training that made it."""
    exported = find_artifact(store, name)
    return exported, find_artifact(store, exported.manifest.inputs["checkpoint"])


def heldout_windows(store: ArtifactStore, trained: Artifact) -> Iterator[tuple[list[Any], int]]:
    """Batches of held-out windows, with the bytes of each document counted in its first batch."""
    tokens = store.fetch(find_artifact(store, trained.manifest.inputs["tokens"])).folder
    for token_set in open_token_sets(str(tokens / "heldout")).values():
        for ids, size in heldout_documents(token_set):
            cut = list(split_windows(ids, token_set.sequence_length))
            batches = [cut[i : i + WINDOWS] for i in range(0, len(cut), WINDOWS)]
            yield from ((batch, size if not i else 0) for i, batch in enumerate(batches))
