"""Weights of a checkpoint: the index is read once, whatever their size."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata

from moray.models.checkpoint import CheckedFolder, write_folder
from moray.models.config import ModelConfig
from moray.models.presets import PRESETS
from moray.models.tensors import checkpoint_shapes, parameter_shapes, stored_tensors
from moray.pipelines.pretrain.checkpoint import stored_weights
from moray.pipelines.pretrain.checkpoint.checkpoint_index import merge_listings
from moray.pipelines.pretrain.checkpoint.checkpoints import CheckpointFailed
from moray.pipelines.pretrain.checkpoint.rank_writer import RankWriter
from moray.pipelines.pretrain.checkpoint.stored_part import StoredPart
from moray.pipelines.pretrain.checkpoint.stored_weights import read_weights

TINY = {
    "vocab_size": 64,
    "hidden_size": 8,
    "intermediate_size": 8,
    "moe_intermediate_size": 8,
    "num_attention_heads": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
}


def write_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], ranks: int = 2) -> None:
    """A checkpoint with a part of each tensor on each rank."""
    writers = [RankWriter(rank) for rank in range(ranks)]
    for rank, writer in enumerate(writers):
        parts = {}
        for key, tensor in tensors.items():
            begin, end = rank * len(tensor) // ranks, (rank + 1) * len(tensor) // ranks
            parts[key] = StoredPart(tensor[begin:end].clone(), begin, len(tensor))
        writer.write(parts, FileSystemWriter(folder, sync_files=False))
    (folder / ".metadata").write_bytes(merge_listings([writer.listing for writer in writers]))


def test_the_index_is_read_once_and_tensors_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {f"layer.{at}": torch.arange(at + 2.0) for at in range(20)}
    biases = {"bias": torch.arange(4.0)}
    moments = {f"exp_avg/{name}": torch.ones(3) for name in weights}
    stored = {f"master/{name}": tensor for name, tensor in weights.items()} | {"buffer/bias": biases["bias"]}
    write_checkpoint(tmp_path, stored | moments)
    reads = []
    read_metadata = FileSystemReader.read_metadata

    def counted(reader: FileSystemReader) -> Metadata:
        reads.append(reader)
        return read_metadata(reader)

    monkeypatch.setattr(FileSystemReader, "read_metadata", counted)
    monkeypatch.setattr(stored_weights, "_READ_BYTES", 100)
    found = dict(read_weights(tmp_path))
    assert len(reads) == 1
    assert found.keys() == weights.keys() | biases.keys()
    for name, tensor in (weights | biases).items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", [".metadata", "__1_0.distcp"])
@pytest.mark.parametrize("bytes_left", [0, 10])
def test_a_truncated_file_is_one_error(tmp_path: Path, name: str, bytes_left: int) -> None:
    write_checkpoint(tmp_path, {"master/a": torch.arange(8.0)})
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:bytes_left])
    with pytest.raises(CheckpointFailed, match="cannot read"):
        list(read_weights(tmp_path))


def large(config: ModelConfig) -> dict[str, torch.Tensor]:
    """The keys of a checkpoint with FP8 moments and EMA, of a config."""
    kinds = [
        "master",
        "ema",
        *(f"exp_avg{square}_{part}" for square in ("", "_sq") for part in ("fp8", "scale", "power")),
    ]
    shapes = parameter_shapes(config)
    tensors = {f"{kind}/{name}": torch.ones(math.prod(shape)) for kind in kinds for name, shape in shapes.items()}
    return tensors | {
        f"buffer/{name}": torch.ones(math.prod(shape))
        for name, shape in checkpoint_shapes(config).items()
        if name not in shapes
    }


@pytest.mark.evidence
def test_a_checkpoint_with_the_tensors_of_v3_is_exported_and_imported(tmp_path: Path) -> None:
    config = dataclasses.replace(PRESETS["v3"], **TINY)
    write_checkpoint(tmp_path / "checkpoint", large(config), ranks=1)
    shapes = checkpoint_shapes(config)
    weights = ((name, tensor.view(shapes[name])) for name, tensor in read_weights(tmp_path / "checkpoint"))
    audit = write_folder(tmp_path / "model", config, weights, "fp8", shard_bytes=20_000)
    assert audit.tensors == len(stored_tensors(PRESETS["v3"], "fp8")) == 91_991
    checked = CheckedFolder(tmp_path / "model")
    assert sum(1 for _ in checked.weights()) == len(shapes)
    assert checked.audit == audit
