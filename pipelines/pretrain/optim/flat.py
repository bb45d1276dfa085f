"""Flat groups of parameters: the location of each logical tensor in an optimizer's flat, possibly partitioned state.

A group's parameters lie one after another in one flat buffer. Gaps align every parameter to a multiple of BLOCK, and
make the buffer divisible into equal partitions of whole blocks, one per rank that holds the group. An FP8 moment's
block, 128 consecutive elements of the flat buffer, therefore belongs to one logical tensor and to one partition. So a
checkpoint does not depend on the partitioning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from moray.models.model import DeepseekV3
from moray.pipelines.pretrain.layout import BLOCK
from moray.pipelines.pretrain.mesh import Mesh


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
    """Parameters that are reduced together and share a weight decay.

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


def flat_groups(model: DeepseekV3, mesh: Mesh) -> list[FlatGroup]:
    """The groups of the model's parameters: dense matrices, vectors, experts. Vectors (norms) have no weight decay."""
    tensors: dict[int, list[tuple[str, int]]] = {}
    owners: dict[int, torch.nn.Parameter] = {}
    for name, view, owner in model.logical_parameters():
        owners[id(owner)] = owner
        tensors.setdefault(id(owner), []).append((name, view.numel()))
    groups = []
    for name, expert, matrix in (("dense", False, True), ("vectors", False, False), ("experts", True, True)):
        chosen = [
            (owner, tensors[key])
            for key, owner in owners.items()
            if (".mlp.experts." in tensors[key][0][0]) == expert and (owner.dim() >= 2) == matrix
        ]
        if chosen:
            groups.append(_group(name, expert, matrix, chosen, mesh.edp if expert else mesh.world))
    return groups


def _group(
    name: str, expert: bool, decays: bool, chosen: list[tuple[torch.nn.Parameter, list[tuple[str, int]]]], replicas: int
) -> FlatGroup:
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
    return FlatGroup(name, expert, decays, parameters, tuple(starts), tuple(logical), whole, replicas)
