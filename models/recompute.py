"""Recompute in the backward instead of saving (DeepSeek-V3 §3.2.3), for tensors that are cheap to compute.

V3 recomputes all RMSNorms and the up-projections of latent attention: their outputs are large (queries, keys and values
of all heads), and their inputs are small and saved anyway. `Recompute` is a context over the forward of one layer.
`run` returns its outputs as usual. But if autograd saves them, or a tensor within `run`, for the backward, it saves a
placeholder. The first placeholder that is restored recomputes the tensors, and the last one frees them.

Notable: nothing runs twice in the forward, and neither router nor dispatch runs again in the backward, so counts and
collectives do not change. Gradients are bit-identical. (torch.utils.checkpoint can recompute the inside of a region,
but not its outputs, which the GEMMs after a norm save.)
"""

from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from moray.kernels.util.place import place

Outputs = TypeVar("Outputs", bound=Tensor | tuple[Tensor, ...])
_hooks = torch.autograd.graph.saved_tensors_hooks


class _Region(Generic[Outputs]):
    """One `run`: the function to recompute its tensors, and the number of outstanding placeholders."""

    def __init__(self, function: Callable[..., Outputs], inputs: tuple[Tensor, ...]) -> None:
        self._function = function
        self._inputs = inputs
        self._kept = {place(tensor) for tensor in inputs}
        self._recomputed: list[Tensor] | None = None
        self.saved = 0
        self.placeholders = 0

    def forward(self) -> Outputs:
        """Runs the function, with placeholders for all saved tensors except inputs and parameters."""

        def pack(tensor: Tensor) -> "Tensor | _Placeholder":
            self.saved += 1
            keep = tensor.is_leaf or place(tensor) in self._kept
            return tensor if keep else _Placeholder(self, self.saved - 1, tensor)

        with _hooks(pack, _restore):
            return self._function(*self._inputs)

    def tensor(self, index: int) -> Tensor:
        """The saved tensor number `index`; the outputs are numbered after the saved tensors."""
        if self._recomputed is None:
            self._recomputed = self._recompute()
        tensor = self._recomputed[index]
        self.placeholders -= 1
        if not self.placeholders:
            self._recomputed = None
        return tensor

    def _recompute(self) -> list[Tensor]:
        saved: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            saved.append(tensor.detach())
            return tensor

        inputs = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in self._inputs]
        with torch.enable_grad(), _hooks(pack, lambda tensor: tensor):
            outputs = self._function(*inputs)
        assert len(saved) == self.saved
        return saved + [output.detach() for output in _each(outputs)]


class _Placeholder:
    """Stands for a tensor, or a view of one, that the region can recompute."""

    def __init__(self, region: "_Region[Any]", index: int, tensor: Tensor) -> None:
        self._region, self._index = region, index
        self._geometry = (tensor.shape, tensor.stride(), tensor.storage_offset())
        region.placeholders += 1

    def restore(self) -> Tensor:
        return self._region.tensor(self._index).as_strided(*self._geometry)


def _each(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def _restore(packed: "Tensor | _Placeholder") -> Tensor:
    return packed.restore() if isinstance(packed, _Placeholder) else packed


class Recompute:
    """The context of one layer's forward; it may be entered again. Does nothing if `on` is False, or without
    gradients."""

    def __init__(self, on: bool) -> None:
        self._on = on and torch.is_grad_enabled()
        self._outputs: dict[
            int, tuple[_Region[Any], int, Tensor]
        ] = {}  # by storage, which lives as long as the tensor here
        self._entered: Any = None

    def run(self, function: Callable[..., Outputs], *inputs: Tensor) -> Outputs:
        """Returns `function(*inputs)`, one tensor or several, which the backward recomputes. They must depend only on
        the inputs and on parameters, and must not be views of other tensors."""
        if not self._on:
            return function(*inputs)
        region = _Region(function, inputs)
        outputs = region.forward()
        for index, output in enumerate(_each(outputs)):
            self._outputs[place(output)[0]] = (region, region.saved + index, output)
        return outputs

    def __enter__(self) -> "Recompute":
        if self._on:
            self._entered = _hooks(self._pack, _restore)
            self._entered.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._on:
            self._entered.__exit__(kind, error, trace)

    def release(self) -> None:
        """Frees the outputs when the layer's forward is complete."""
        self._outputs.clear()

    def _pack(self, tensor: Tensor) -> Tensor | _Placeholder:
        known = self._outputs.get(place(tensor)[0])
        return tensor if known is None else _Placeholder(known[0], known[1], tensor)
