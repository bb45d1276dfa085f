"""Flat groups of parameters: the location of each logical tensor in an optimizer's flat, possibly partitioned state.

A group's parameters lie one after another in one flat buffer. Gaps align every parameter to a multiple of BLOCK, and
make the buffer divisible into equal partitions of whole blocks, one per rank that holds the group. An FP8 moment's
block, 128 consecutive elements of the flat buffer, therefore belongs to one logical tensor and to one partition. So a
checkpoint does not depend on the partitioning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from moray.models.model import DeepseekV3
from moray.pipelines.pretrain.layout import BLOCK
from moray.pipelines.pretrain.mesh import Mesh

_SQUARES = 1 << 24


@dataclass(frozen=True)
class PartitionPiece:
    """Elements [offset, offset + numel) of the logical tensor `name`, which has `total` elements. at: their offset in
    the partition."""

    name: str
    offset: int
    numel: int
    total: int
    at: int


@dataclass(frozen=True)
class Logical:
    """A logical tensor of `numel` elements that starts at `start` of the flat buffer."""

    name: str
    start: int
    numel: int


@dataclass(frozen=True)
class FlatGroup:
    """Parameters that are reduced together and share a weight decay. stage: that uses them (`DeepseekV3.stage_of`), or
    None for parameters of several stages.

    starts: offset of each parameter in the flat buffer of `numel` elements. replicas: number of ranks that hold the
    group, each the whole of it or one of `replicas` equal partitions.
    """

    name: str
    expert: bool
    decays: bool
    parameters: tuple[torch.nn.Parameter, ...]
    starts: tuple[int, ...]
    logical: tuple[Logical, ...]
    numel: int
    replicas: int
    stage: int | None = None

    @property
    def partition(self) -> int:
        """Elements of one partition."""
        return self.numel // self.replicas

    @property
    def gaps(self) -> list[int]:
        """Unused elements after each parameter."""
        ends = (*self.starts[1:], self.numel)
        pairs = zip(self.starts, self.parameters, ends, strict=True)
        return [end - start - parameter.numel() for start, parameter, end in pairs]

    def pieces(self, begin: int, end: int) -> Iterator[PartitionPiece]:
        """The pieces of logical tensors in elements [begin, end) of the flat buffer."""
        for tensor in self.logical:
            first, last = max(begin, tensor.start), min(end, tensor.start + tensor.numel)
            if first < last:
                yield PartitionPiece(tensor.name, first - tensor.start, last - first, tensor.numel, first - begin)


def square_sum(flat: torch.Tensor) -> torch.Tensor:
    """The sum of squares, a part at a time, so that the squares take little memory. (`vector_norm` takes none, but adds
    up FP32 numbers in sequence.)"""
    return torch.stack([part.square().sum() for part in torch.split(flat, _SQUARES)]).sum()


def flat_groups(model: DeepseekV3, mesh: Mesh) -> list[FlatGroup]:
    """The groups of the model's parameters: dense matrices, vectors, experts. Vectors (norms) have no weight decay."""

    def kind_of(owner: torch.nn.Parameter, name: str) -> str:
        return "experts" if _is_expert(name) else "dense" if owner.dim() >= 2 else "vectors"

    return _groups(model, mesh, ["dense", "vectors", "experts"], lambda owner, name: (kind_of(owner, name), None))


def stage_groups(model: DeepseekV3, mesh: Mesh) -> list[FlatGroup]:
    """The groups of each stage: its dense matrices and its experts. Before them, over all stages, the vectors and the
    matrices of routers, which are small."""

    def place(owner: torch.nn.Parameter, name: str) -> tuple[str, int | None]:
        if owner.dim() < 2:
            return "vectors", None
        if name.endswith(".mlp.gate.weight"):
            return "routers", None
        return "experts" if _is_expert(name) else "dense", model.stage_of(name)

    return _groups(model, mesh, ["vectors", "routers", "dense", "experts"], place)


def _is_expert(name: str) -> bool:
    return ".mlp.experts." in name


def _groups(
    model: DeepseekV3,
    mesh: Mesh,
    kinds: Sequence[str],
    place: Callable[[torch.nn.Parameter, str], tuple[str, int | None]],
) -> list[FlatGroup]:
    """place: (kind, stage) of a parameter, by the name of its first logical tensor."""
    chosen: dict[tuple[str, int | None], dict[int, tuple[torch.nn.Parameter, list[tuple[str, int]]]]] = {}
    for name, view, owner in model.logical_parameters():
        _, tensors = chosen.setdefault(place(owner, name), {}).setdefault(id(owner), (owner, []))
        tensors.append((name, view.numel()))
    ordered = sorted(chosen, key=lambda key: (-1 if key[1] is None else key[1] + 1, kinds.index(key[0])))
    return [_group(kind, stage, list(chosen[kind, stage].values()), mesh) for kind, stage in ordered]


def _group(
    kind: str, stage: int | None, chosen: list[tuple[torch.nn.Parameter, list[tuple[str, int]]]], mesh: Mesh
) -> FlatGroup:
    expert = kind == "experts"
    replicas = mesh.edp if expert else mesh.world
    starts, logical, at = [], [], 0
    for owner, tensors in chosen:
        starts.append(at)
        within = at
        for tensor, numel in tensors:
            logical.append(Logical(tensor, within, numel))
            within += numel
        at += math.ceil(owner.numel() / BLOCK) * BLOCK
    whole = math.ceil(at / (BLOCK * replicas)) * BLOCK * replicas
    parameters = tuple(owner for owner, _ in chosen)
    name = kind if stage is None else f"{kind} of stage {stage}"
    decays = kind != "vectors"
    return FlatGroup(name, expert, decays, parameters, tuple(starts), tuple(logical), whole, replicas, stage)
