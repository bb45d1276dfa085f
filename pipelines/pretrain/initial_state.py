"""The weights that training starts from, written into an optimizer's masters.

A rank makes only what it holds: it draws one tensor at a time, on its own device, and reads parts of a tensor of a
folder, on the host.
"""

from __future__ import annotations

from collections.abc import Iterator

from moray.models.checkpoint import CheckedFolder
from moray.models.initial import initial_value
from moray.models.model import DeepseekV3
from moray.pipelines.pretrain.optim.optimizer import Fragment, ShardedOptimizer
from moray.platform.store.paths import any_path, local_folder


def draw_weights(optimizer: ShardedOptimizer, std: float, seed: int) -> None:
    """Sets random weights (`models/initial.py`)."""
    for master in _masters(optimizer):
        part = slice(master.offset, master.offset + len(master.tensor))
        # Not in a variable, which would keep one tensor while the next is drawn.
        master.tensor.copy_(initial_value(master.name, master.total, std, seed, master.tensor.device)[part])


def fill_weights(folder: str, model: DeepseekV3, optimizer: ShardedOptimizer) -> None:
    """Sets the weights and router biases of a Hugging Face folder, local or in a store."""
    with local_folder(any_path(folder)) as local:
        source = CheckedFolder(local)  # whoever made the folder has compared the copies of shared tensors
        for master in _masters(optimizer):
            source.read_flat(master.name, master.offset, master.tensor)
        for name, bias_E in model.logical_biases():
            bias_E.copy_(source.read(name).tensor)


def _masters(optimizer: ShardedOptimizer) -> Iterator[Fragment]:
    return (fragment for fragment in optimizer.fragments() if fragment.kind == "master")
