"""What a layer keeps for the backward in FP8 training, by part: bytes of each token at DeepSeek-V3's sizes, pinned.

A tensor that is kept by accident costs gigabytes there and changes no result, so no other test sees it. The model is on
the meta device: the code of a GPU runs, without numbers and without launches of its kernels.
"""

import dataclasses
import sys
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from moray.kernels.util.place import place
from moray.models.model import DeepseekV3
from moray.models.presets import preset
from moray.models.recompute import Recompute

TOKENS = 4096
PARTS = {  # the innermost frame of these files
    "models/attention.py": "attention",
    "models/expert_shard.py": "experts",
    "models/expert_parallel/dispatcher.py": "dispatch",
    "models/moe.py": "router and shared expert",
    "models/decoder.py": "residual stream",
}


def part() -> str:
    frame = sys._getframe(1)
    while frame is not None:
        for file, name in PARTS.items():
            if frame.f_code.co_filename.endswith(file):
                return name
        frame = frame.f_back
    return "rest"


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[tuple[int, int], tuple[str, Tensor]]]:
    """The tensors that are kept, by place, with their part."""
    found: dict[tuple[int, int], tuple[str, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not tensor.is_leaf or not tensor.requires_grad:
            found.setdefault(place(tensor), (part(), tensor))
        return tensor

    pack = Recompute._pack

    def pack_and_record(self: Recompute, tensor: Tensor) -> object:
        packed = pack(self, tensor)
        return keep(packed) if isinstance(packed, Tensor) else packed

    monkeypatch.setattr(Recompute, "_pack", pack_and_record)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found


@pytest.fixture(autouse=True)
def _no_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MORAY_KERNELS", "triton")
    monkeypatch.setattr(InterpretedFunction, "run", lambda *arguments, **options: None)


def v3(layers: int, recompute: bool) -> DeepseekV3:
    config = dataclasses.replace(preset("v3"), num_hidden_layers=layers, num_nextn_predict_layers=0)
    model = DeepseekV3(config).train()
    model.compute_in(torch.bfloat16)
    model.train_in_fp8()
    model.set_recompute("v3" if recompute else "none")
    return model


def bytes_saved(saved: dict[tuple[int, int], tuple[str, Tensor]], layers: int, recompute: bool) -> Counter[str]:
    """Bytes that a forward of V3 with some layers keeps, by part."""
    with torch.device("meta"):
        model = v3(layers, recompute)
        saved.clear()
        model.training_loss(*torch.zeros(2, 1, TOKENS, dtype=torch.int64))
    storages = {place(tensor)[0]: (name, tensor.untyped_storage().nbytes()) for name, tensor in saved.values()}
    sizes: Counter[str] = Counter()
    for name, size in storages.values():
        sizes[name] += size
    return sizes


# 65,280 rows are at the experts: eight for each of 4,096 tokens, and 127 rows of padding for each of 256 experts. A row
# keeps 11,264 bytes of FP8 numbers, those of its input (7,168) and of gate and up (2 x 2,048), and their scales.
@pytest.mark.parametrize(
    ("recompute", "expected"),
    [
        (False, {"residual stream": 28687, "attention": 178093, "router and shared expert": 27040, "experts": 185194}),
        (True, {"attention": 40676, "router and shared expert": 12704, "experts": 185194}),
    ],
)
def test_a_layer_keeps_what_its_backward_needs(saved, recompute: bool, expected: dict[str, int]) -> None:
    sizes = bytes_saved(saved, 5, recompute)
    sizes.subtract(bytes_saved(saved, 4, recompute))
    assert {name: size // TOKENS for name, size in sizes.items() if size} == expected


def test_a_step_reads_no_number_on_the_host() -> None:
    """A tensor of the meta device has none, so any synchronization would fail."""
    with torch.device("meta"):
        model = v3(layers=4, recompute=True)
        terms = model.training_loss(*torch.zeros(2, 1, TOKENS, dtype=torch.int64))
        (terms.main + terms.mtp + terms.balance).backward()
    assert all(weight.grad.shape == weight.shape for weight in model.parameters())
