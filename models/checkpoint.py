"""Reading and writing the Hugging Face layout of DeepSeek-V3.

A folder holds `config.json` and either `model.safetensors` or `model-00001-of-0000n.safetensors` with
`model.safetensors.index.json`; one key per parameter and one per expert. transformers, vLLM, SGLang and llama.cpp's
converter read it.

Notable: `config.json` is removed first and written last, and shards get their names only when all are written, so a
folder with a config is a complete one at every instant. Reading and writing both hold the tensors against the config:
a missing, extra, misshapen or non-finite one is refused by name.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moray.models.config import ModelConfig
from moray.models.layer import Dispatcher
from moray.models.model import DeepseekV3
from moray.models.tensors import Shape, bias_shapes, checkpoint_shapes

_CONFIG = "config.json"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_TEMPORARY = ".part-{:05d}.safetensors"
_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
SHARD_BYTES = 2_000_000_000


def save(model: DeepseekV3, folder: str | Path, precision: str = "float32", shard_bytes: int = SHARD_BYTES) -> None:
    """Writes `model` to `folder`, replacing a model that is there. precision: "float32" or "bf16".

    The model must hold every expert; one spread over ranks is exported from its checkpoint with `write`.
    """
    config = model.config
    if config.moe_layers and len(model.experts) != config.n_routed_experts:
        raise ValueError(f"the model holds experts {model.experts} of {config.n_routed_experts}: nothing to save whole")
    write(folder, config, _tensors(model), precision, shard_bytes)


def _tensors(model: DeepseekV3) -> Iterator[tuple[str, Tensor]]:
    for name, view, _ in model.logical_parameters():
        yield name, view
    yield from model.logical_biases()


def write(
    folder: str | Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    precision: str = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes logical tensors, in any order, as a Hugging Face folder; holds one shard in memory at a time.

    Router biases stay FP32 at any precision. Raises ValueError for an unknown precision and, naming it, for a tensor
    that the config does not have, lacks, or that has the wrong shape or a value that is not finite.
    """
    dtype = _dtype(precision)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _CONFIG).unlink(missing_ok=True)
    parts: list[dict[str, int]] = []
    try:
        for part in _parts(_checked(config, tensors, dtype), shard_bytes):
            path = folder / _TEMPORARY.format(len(parts))
            save_file(part, path, metadata={"format": "pt"})
            _flush(path)
            parts.append({name: tensor.nbytes for name, tensor in part.items()})
    except BaseException:
        for path in folder.glob(".part-*"):
            path.unlink()
        raise
    _name_shards(folder, parts)
    hf = config.to_hf("bfloat16" if precision == "bf16" else "float32")
    _write_json(folder / _CONFIG, hf)


def _dtype(precision: str) -> torch.dtype:
    if precision == "fp8":
        raise ValueError("precision 'fp8' is not supported yet; use 'float32' or 'bf16'")
    if precision not in _DTYPES:
        raise ValueError(f"precision {precision!r} must be one of {', '.join(_DTYPES)}")
    return _DTYPES[precision]


def _checked(
    config: ModelConfig, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The tensors as they are stored, each held against the config; complains at the end of what did not come."""
    expected, biases = checkpoint_shapes(config), bias_shapes(config)
    for name, tensor in tensors:
        if name not in expected:
            raise ValueError(f"tensor {name!r} came twice or is none of the config's")
        _check_tensor(name, tensor, expected.pop(name))
        yield name, tensor.detach().to("cpu", torch.float32 if name in biases else dtype).contiguous()
    if expected:
        raise ValueError(f"{len(expected)} tensors are missing, the first {next(iter(expected))!r}")


def _check_tensor(name: str, tensor: Tensor, shape: Shape) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"tensor {name!r} has shape {tuple(tensor.shape)}, the config says {shape}")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"tensor {name!r} holds values that are not finite (NaN or infinite)")


def _parts(tensors: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    """Groups consecutive tensors up to `limit` bytes; a larger tensor is a group of its own."""
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if part and size + tensor.nbytes > limit:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += tensor.nbytes
    yield part


def _name_shards(folder: Path, parts: list[dict[str, int]]) -> None:
    """Gives finished shards their names, writes the index, and removes what an earlier model left."""
    for stale in [*folder.glob("model*.safetensors"), folder / _INDEX]:
        stale.unlink(missing_ok=True)
    if len(parts) == 1:
        (folder / _TEMPORARY.format(0)).replace(folder / _SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts):
        final = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        (folder / _TEMPORARY.format(number)).replace(folder / final)
        weight_map |= dict.fromkeys(part, final)
    total = sum(sum(part.values()) for part in parts)
    _write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _flush(temporary)
    temporary.replace(path)


def _flush(path: Path) -> None:
    """A rename must not reach the disk before the bytes that it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    experts: range | None = None,
    dispatcher: Dispatcher | None = None,
) -> DeepseekV3:
    """Reads a Hugging Face folder into a model of `dtype` on the CPU, in eval mode.

    Experts outside `experts` are not read. Raises FileNotFoundError without a config or weights, ValueError for a
    config that `ModelConfig.from_hf` refuses and, naming it, for a tensor that is missing, extra, misshapen or not
    finite.
    """
    folder = Path(folder)
    hf = _read_json(folder / _CONFIG)
    config = ModelConfig.from_hf(hf)
    with torch.device("meta"):
        model = DeepseekV3(config, experts, dispatcher)
    model = model.to(dtype).to_empty(device="cpu").eval()
    model.reset_counters()
    files = _locate(folder)
    left_out = tuple(_prediction_layers(config, hf))
    _check_names(config, {name for name in files if not name.startswith(left_out)})
    shapes, targets = checkpoint_shapes(config), dict(_tensors(model))
    for path in sorted(set(files.values())):
        with _open(path) as shard:
            for name in [name for name in targets if files[name] == path]:
                tensor = _read_tensor(shard, name, path)
                _check_tensor(name, tensor, shapes[name])
                targets[name].copy_(tensor)
    return model


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent} is not a model folder: it has no {path.name}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def _prediction_layers(config: ModelConfig, hf: Mapping[str, Any]) -> Iterator[str]:
    """Prefixes of the multi-token prediction layers, which sit after the last layer in DeepSeek's own checkpoints."""
    for extra in range(hf.get("num_nextn_predict_layers") or 0):
        yield f"model.layers.{config.num_hidden_layers + extra}."


def _locate(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor, from the files themselves (the index may be wrong about them)."""
    index = folder / _INDEX
    names = sorted(set(_read_json(index)["weight_map"].values())) if index.exists() else [_SINGLE]
    files: dict[str, Path] = {}
    for name in names:
        with _open(folder / name) as shard:
            files |= dict.fromkeys(shard.keys(), folder / name)
    return files


def _open(path: Path) -> Any:
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} lacks the weights in {path.name}")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None


def _check_names(config: ModelConfig, found: set[str]) -> None:
    expected = checkpoint_shapes(config)
    for name in expected:
        if name not in found:
            raise ValueError(f"tensor {name!r} is missing from the checkpoint")
    for name in sorted(found - expected.keys()):
        raise ValueError(f"tensor {name!r} is in the checkpoint but not in the model of its config")


def _read_tensor(shard: Any, name: str, path: Path) -> Tensor:
    try:
        tensor: Tensor = shard.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"tensor {name!r} cannot be read from {path}: {error}") from None
    return tensor
