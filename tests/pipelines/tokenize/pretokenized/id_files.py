"""Files of token ids as other programs write them, written here from their formats."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moray.pipelines.tokenizer.train import TokenizerConfig, hugging_face_config, train_tokenizer

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}
Documents = Sequence[Sequence[int]]


def write_megatron(prefix: Path, documents: Sequence[Documents], dtype: str = "uint16") -> None:
    """A pair of files. A document is a list of sequences."""
    sequences = [sequence for document in documents for sequence in document]
    arrays = [np.array(sequence, np.dtype(dtype).newbyteorder("<")) for sequence in sequences]
    sizes = np.array([len(array) for array in arrays], "<i4")
    pointers = np.cumsum([0, *(array.nbytes for array in arrays)])[:-1].astype("<i8")
    bounds = np.cumsum([0, *map(len, documents)]).astype("<i8")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    prefix.with_name(prefix.name + ".bin").write_bytes(b"".join(array.tobytes() for array in arrays))
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, CODES[dtype], len(arrays), len(bounds))
    index = header + sizes.tobytes() + pointers.tobytes() + bounds.tobytes()
    prefix.with_name(prefix.name + ".idx").write_bytes(index)


def write_parquet_ids(path: Path, documents: Documents, column: str = "input_ids", row_group: int = 7) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({column: pa.array(documents, pa.list_(pa.int32())), "n": range(len(documents))})
    pq.write_table(table, path, row_group_size=row_group)


def write_saved_dataset(folder: Path, documents: Documents, files: int = 2, batch: int = 5) -> None:
    """A folder as `Dataset.save_to_disk` writes it: Arrow streams and descriptions."""
    folder.mkdir(parents=True, exist_ok=True)
    schema = pa.schema({"input_ids": pa.list_(pa.int32()), "attention_mask": pa.list_(pa.int8())})
    names = [f"data-{number:05d}-of-{files:05d}.arrow" for number in range(files)]
    size = -(-len(documents) // files)
    for number, name in enumerate(names):
        own = documents[number * size : (number + 1) * size]
        rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in own]
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for at in range(0, len(rows), batch):
                writer.write_batch(pa.RecordBatch.from_pylist(rows[at : at + batch], schema))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")


def write_tokenizer(folder: Path) -> Path:
    """A small tokenizer with bos 0, eos 1 and pad 2."""
    folder.mkdir(parents=True)
    text = "the quick brown fox jumps over a lazy dog, while nine waxy zebras quietly vex my judge " * 4
    train_tokenizer(iter([text]), TokenizerConfig(vocab_size=300)).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(hugging_face_config()))
    return folder
