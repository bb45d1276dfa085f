"""Reads and writes models in the Hugging Face layout of DeepSeek-V3, in FP32, BF16 or the official FP8 format.

There is one key per parameter and per expert. In the FP8 format the linear layers are E4M3 (`NAME.weight`) with one
FP32 scale per 128 x 128 block (`NAME.weight_scale_inv`), as declared in `quantization_config`; the rest is BF16.
transformers, vLLM, SGLang and llama.cpp's converter read such folders.

Notable: reading and writing stream one tensor at a time. FP8 weights stay FP8, bit for bit, unless requested otherwise.
Reading and writing both check the tensors against the config: a missing, extra, misshapen or non-finite tensor raises
an error with its name.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moray.kernels import quantize as fp8_blocks
from moray.kernels.quantize import BLOCK
from moray.models.config import ModelConfig
from moray.models.expert_parallel.stages import Dispatcher
from moray.models.model import DeepseekV3
from moray.models.safetensors_folder import DTYPES, SHARD_BYTES, Audit, FolderReader, FolderWriter
from moray.models.tensors import (
    Shape,
    bias_shapes,
    checkpoint_shapes,
    is_quantized,
    scale_name,
    shared_tensors,
    stored_tensors,
)

PRECISIONS = {"float32": "float32", "bf16": "bfloat16", "fp8": "bfloat16"}  # -> config.json's torch_dtype
_FP8_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}
_BLOCK = (BLOCK, BLOCK)
_LARGEST_FP8 = torch.finfo(torch.float8_e4m3fn).max
_CHUNK = 1 << 20  # elements of a large tensor that are checked, converted or compared at once


class Weight(NamedTuple):
    """A tensor by canonical name, with its `scales` if it is FP8."""

    name: str
    tensor: Tensor
    scales: Tensor | None = None


def save(model: DeepseekV3, folder: str | Path, precision: str = "float32", shard_bytes: int = SHARD_BYTES) -> None:
    """Writes `model` to `folder`, replacing an existing model. precision: "float32", "bf16" or "fp8".

    The model must hold every expert. If its experts are distributed over ranks, export its checkpoint with
    `write_folder`.
    """
    config = model.config
    if config.moe_layers and len(model.experts) != config.n_routed_experts:
        raise ValueError(f"the model holds only experts {model.experts} of {config.n_routed_experts}: cannot save it")
    write_weights(folder, config, _weights(model), precision, shard_bytes)


def _weights(model: DeepseekV3) -> Iterator[Weight]:
    """All tensors of the model, in the dtypes that it holds."""
    scales = dict(model.logical_scales())
    for name, view, _ in model.logical_parameters():
        yield Weight(name, view, scales.get(name))
    for name, bias_E in model.logical_biases():
        yield Weight(name, bias_E)


def write_folder(
    folder: str | Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    precision: str = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> Audit:
    """Writes logical tensors, in any order, as a Hugging Face folder; holds one tensor in memory at a time. Returns the
    number of tensors and values that it has written, all of them checked.

    Router biases stay FP32 at any precision. Raises ValueError for an unknown precision. Raises ValueError with the
    tensor's name if a tensor is not in the config, missing, misshapen or not finite.
    """
    return write_weights(folder, config, (Weight(name, tensor) for name, tensor in tensors), precision, shard_bytes)


def convert(source: str | Path, folder: str | Path, precision: str, shard_bytes: int = SHARD_BYTES) -> Audit:
    """Converts the model of one folder to another folder in `precision`, one tensor at a time. Returns what
    `write_folder` returns. Raises the errors of `load` and `write_folder`."""
    checked = CheckedFolder(source)
    return write_weights(folder, checked.config, checked.weights(), precision, shard_bytes)


def write_weights(
    folder: str | Path,
    config: ModelConfig,
    weights: Iterable[Weight],
    precision: str,
    shard_bytes: int = SHARD_BYTES,
) -> Audit:
    """`write_folder` for weights, some of which may be FP8."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} must be one of {', '.join(PRECISIONS)}")
    expected, biases = checkpoint_shapes(config), bias_shapes(config)
    copies = [(copy, source) for copy, source in shared_tensors(config).items()]
    with FolderWriter(Path(folder), stored_tensors(config, precision), shard_bytes) as writer:
        for weight in weights:
            if weight.name not in expected:
                raise ValueError(f"tensor {weight.name!r} is duplicate or not in the model of the config")
            _check_values(weight, expected.pop(weight.name))
            if precision == "fp8" and is_quantized(weight.name):
                fp8, scales = _to_fp8(weight)
                _check_values(Weight(weight.name, fp8, scales), tuple(fp8.shape))
                writer.write(weight.name, fp8)
                writer.write(scale_name(weight.name), scales)
                continue
            dtype = torch.float32 if weight.name in biases else getattr(torch, PRECISIONS[precision])
            stored = _to_dtype(weight, dtype)
            for name in (weight.name, *(copy for copy, source in copies if source == weight.name)):
                writer.write(name, stored)
        if expected:
            raise ValueError(f"{len(expected)} tensors are missing, the first {next(iter(expected))!r}")
        hf = config.to_hf(PRECISIONS[precision])
        writer.finish(hf | {"quantization_config": _FP8_CONFIG} if precision == "fp8" else hf)
    return writer.written


def _check_values(weight: Weight, shape: Shape) -> None:
    if tuple(weight.tensor.shape) != shape:
        raise ValueError(f"tensor {weight.name!r} has shape {tuple(weight.tensor.shape)}, the config requires {shape}")
    if weight.scales is not None:
        fp8_blocks.check_scales(weight.tensor, weight.scales, _BLOCK)
        _check_scales(scale_name(weight.name), weight.scales)
    _check_finite(weight.name, weight.tensor)


def _check_scales(name: str, scales: Tensor) -> None:
    if not (_is_finite(scales) and (scales > 0).all()):
        raise ValueError(f"tensor {name!r} holds scales that are not positive and finite")
    if not _is_finite(scales.float() * _LARGEST_FP8):
        raise ValueError(f"tensor {name!r} holds scales that make weights overflow FP32")


def _check_finite(name: str, tensor: Tensor) -> None:
    if not _is_finite(tensor):
        raise ValueError(f"tensor {name!r} holds values that are not finite (NaN or infinite)")


def _is_finite(tensor: Tensor) -> bool:
    """Checks one part at a time, to limit the memory for the boolean results."""
    parts = torch.split(tensor.reshape(-1), _CHUNK)
    if tensor.dtype == torch.float8_e4m3fn:  # has NaNs, all bits but the sign set, and no infinity
        return all(bool(((part.view(torch.uint8) & 0x7F) != 0x7F).all()) for part in parts)
    return all(bool(part.isfinite().all()) for part in parts)


def _bands(shape: Shape, first: int = 0, last: int | None = None) -> Iterator[slice]:
    """Slices of whole blocks of a tensor's rows, about `_CHUNK` elements each, that contain rows [first, last)."""
    rows = max(1, _CHUNK // (math.prod(shape[1:]) * BLOCK)) * BLOCK
    end = shape[0] if last is None else last
    yield from (slice(begin, min(begin + rows, shape[0])) for begin in range(first // BLOCK * BLOCK, end, rows))


def _blocks(band: slice) -> slice:
    """The rows of scales that belong to a band."""
    return slice(band.start // BLOCK, -(-band.stop // BLOCK))


def _to_fp8(weight: Weight) -> tuple[Tensor, Tensor]:
    if weight.scales is not None:
        return weight.tensor, weight.scales
    parts = [fp8_blocks.quantize(weight.tensor.detach()[band], _BLOCK) for band in _bands(tuple(weight.tensor.shape))]
    return torch.cat([fp8 for fp8, _ in parts]), torch.cat([scales for _, scales in parts])


def _to_dtype(weight: Weight, dtype: torch.dtype) -> Tensor:
    """Converts to `dtype`, whose range may be smaller than FP32's. Numbers above BF16's range become its largest
    number, which is within its precision. For FP16 that would be far off, so it raises ValueError."""
    converted = _dequantized(weight, dtype)
    narrows = torch.finfo(dtype).max < torch.finfo(weight.tensor.dtype).max or weight.scales is not None
    if dtype == torch.float32 or not narrows or _is_finite(converted):
        return converted
    if dtype != torch.bfloat16:
        raise ValueError(f"tensor {weight.name!r} holds values outside the range of {dtype}")
    largest = torch.finfo(dtype).max
    return converted.clamp_(-largest, largest)


def _dequantized(weight: Weight, dtype: torch.dtype) -> Tensor:
    if weight.scales is None:
        return weight.tensor.detach().to("cpu", dtype)
    converted = torch.empty(weight.tensor.shape, dtype=dtype)
    for band in _bands(tuple(converted.shape)):
        scales = weight.scales[_blocks(band)]
        converted[band] = fp8_blocks.dequantize(weight.tensor[band], scales, _BLOCK, dtype)
    return converted


class CheckedFolder:
    """A folder whose names, dtypes and shapes agree with its config; values are checked as they are read.

    Without `mtp` the multi-token prediction layers are excluded. They are also excluded if the config declares them and
    no tensor exists, because transformers writes such folders. audit: the tensors that were read whole, with their
    values checked.
    """

    def __init__(self, folder: str | Path, mtp: bool = True) -> None:
        self._reader = FolderReader(Path(folder))
        config = ModelConfig.from_hf(self._reader.config)
        self.precision = _stored_precision(self._reader.config)
        found = set(self._reader.names())
        skipped = {name for name in found if name.startswith(tuple(_prefixes(config)))}
        if not mtp or not skipped:
            found -= skipped
            config = config.without_mtp()
        self.config = config
        self.audit = Audit()
        self._shapes = checkpoint_shapes(config)
        self._check_entries(found)

    def read(self, name: str) -> Weight:
        """A tensor and its scales."""
        scales = self._reader.read(scale_name(name)) if self._is_fp8(name) else None
        weight = Weight(name, self._reader.read(name), scales)
        _check_values(weight, self._shapes[name])
        self.audit.add(weight.tensor, weight.scales)
        return weight

    def read_wide(self, name: str) -> Tensor:
        """A tensor in high precision, dequantized to FP32 if it is FP8."""
        weight = self.read(name)
        return weight.tensor if weight.scales is None else _dequantized(weight, torch.float32)

    def read_flat(self, name: str, offset: int, target: Tensor) -> None:
        """Copies elements [offset, offset + len(target)) of a flattened tensor, dequantized if FP8, into `target`, of
        any float dtype and device. Holds about `_CHUNK` of them, and checks the values of the rows that it reads."""
        shape = self._shapes[name]
        width, end = math.prod(shape[1:]), offset + len(target)
        scales = self._reader.read(scale_name(name)) if self._is_fp8(name) else None
        if scales is not None:
            _check_scales(scale_name(name), scales)
        for band in _bands(shape, offset // width, -(-end // width)):
            rows = self._reader.read(name, band)
            _check_finite(name, rows)
            if scales is not None:
                rows = fp8_blocks.dequantize(rows, scales[_blocks(band)], _BLOCK, torch.float32)
            start = band.start * width
            begin, stop = max(offset, start), min(end, band.stop * width)
            target[begin - offset : stop - offset].copy_(rows.flatten()[begin - start : stop - start])

    def weights(self) -> Iterator[Weight]:
        """Every tensor, in the order of the config."""
        self.check_copies()
        yield from (self.read(name) for name in self._shapes)

    def check_copies(self) -> None:
        """Raises ValueError if a copy of a shared tensor differs from the tensor."""
        for copy, source in shared_tensors(self.config).items():
            if copy not in self._reader:
                continue
            if not self._equal(copy, source):
                raise ValueError(f"tensor {copy!r} differs from {source!r}, which it must share")
            self.audit.tensors += 1
            self.audit.values += math.prod(self._shapes[source])

    def _equal(self, name: str, other: str) -> bool:
        read, bands = self._reader.read, _bands(self._shapes[other])
        return all(torch.equal(read(name, band), read(other, band)) for band in bands)

    def _is_fp8(self, name: str) -> bool:
        return self.precision == "fp8" and is_quantized(name)

    def _check_entries(self, found: set[str]) -> None:
        stored = stored_tensors(self.config, self.precision)
        optional = shared_tensors(self.config)
        for name in stored:
            if name not in found and name not in optional:
                raise ValueError(f"tensor {name!r} is missing from the checkpoint")
        for name in sorted(found):
            if name not in stored:
                raise ValueError(f"tensor {name!r} is in the checkpoint but not in the model of its config")
            dtype, shape = self._reader.entry(name)
            if shape != stored[name][1]:
                raise ValueError(f"tensor {name!r} has shape {shape}, the config requires {stored[name][1]}")
            fp8 = stored[name][0] == "F8_E4M3"
            if dtype not in DTYPES or fp8 != (dtype == "F8_E4M3"):
                required = "F8_E4M3" if fp8 else "BF16"
                raise ValueError(f"tensor {name!r} has dtype {dtype}, the config requires {required}")


def _prefixes(config: ModelConfig) -> Iterator[str]:
    """Name prefixes of MTP layers. The trailing dot distinguishes layer 6 from layer 61."""
    for layer in config.mtp_layers or range(config.num_hidden_layers, config.num_hidden_layers + 1):
        yield f"model.layers.{layer}."


def _stored_precision(hf: dict[str, Any]) -> str:
    """Returns "fp8" or "bf16" (for any high-precision dtype). Raises ValueError for another quantization."""
    quantization = hf.get("quantization_config")
    if quantization is None:
        return "bf16"
    if not isinstance(quantization, Mapping):
        raise ValueError(f"quantization_config = {quantization!r} must be an object, or null")
    for name, only in _FP8_CONFIG.items():
        if quantization.get(name, only) != only:
            raise ValueError(f"quantization_config.{name} = {quantization[name]!r} must be {only!r}")
    return "fp8"


def load(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    experts: range | None = None,
    dispatcher: Dispatcher | None = None,
    mtp: bool = True,
    dequantize: bool = False,
    int8_routers: bool = False,
) -> DeepseekV3:
    """Reads a Hugging Face folder into a model of `dtype` on the CPU, in eval mode.

    FP8 weights stay FP8 and cannot be trained, unless `dequantize` is set. With `int8_routers` the routers take half of
    their BF16 size (`benchmarks/router_int8.py` measures the effect). Experts outside `experts` are not read, and
    neither are the multi-token prediction layers without `mtp`. Raises FileNotFoundError without a config or weights.
    Raises ValueError for a config that `ModelConfig.from_hf` refuses, and, with its name, for a tensor that is missing,
    extra, misshapen or not finite.
    """
    source = CheckedFolder(folder, mtp)
    with torch.device("meta"):
        model = DeepseekV3(source.config, experts, dispatcher)
    model = model.to(dtype)
    if source.precision == "fp8" and not dequantize:
        model.store_fp8()
    model = model.to_empty(device="cpu").eval()
    model.reset_counters()
    load_weights(model, source)
    if int8_routers:
        for router in model.routers():
            router.store_int8()
    return model


@torch.no_grad()
def load_weights(model: DeepseekV3, source: CheckedFolder) -> None:
    """Fills the tensors of `model`, on any device and of any dtype. The model's config must be the folder's."""
    source.check_copies()
    for target in _weights(model):
        weight = source.read(target.name)
        if target.scales is None:
            target.tensor.copy_(_to_dtype(weight, target.tensor.dtype))
        else:
            assert weight.scales is not None
            target.tensor.copy_(weight.tensor)
            target.scales.copy_(weight.scales)
