"""FP8 forms of weights, kept for as long as the weights stay as they are.

A weight is quantised once per optimizer step, not once per micro-batch.

Notable: torch counts the in-place changes of a tensor, but its fused optimizers do not count theirs. So a form is also
made anew after any step of any torch optimizer; whoever changes weights in yet another way calls `weights_changed`.
"""

from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from moray.kernels.fp8_linear import Fp8Weight, fp8_weight


class Fp8Forms:
    """The FP8 forms of a weight [N, K], or of every matrix in a stack of them."""

    changes: ClassVar[int] = 0  # of weights anywhere in this process, as far as torch does not count them

    def __init__(self) -> None:
        self._seen: tuple[int, int, int] | None = None
        self._forms: dict[int, Fp8Weight] = {}

    def of(self, owner: Tensor, index: int | None = None) -> Fp8Weight:
        """The form of the parameter `owner`, or of its matrix number `index`."""
        now = (owner.data_ptr(), owner._version, Fp8Forms.changes)
        if now != self._seen:
            self._seen = now
            self._forms.clear()
        key = -1 if index is None else index
        if key not in self._forms:
            self._forms[key] = fp8_weight(owner if index is None else owner[index])
        return self._forms[key]


def weights_changed(*_: Any) -> None:
    """Makes all forms in this process out of date."""
    Fp8Forms.changes += 1


register_optimizer_step_post_hook(weights_changed)
