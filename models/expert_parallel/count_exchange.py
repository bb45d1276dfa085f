"""The counts that ranks exchange ahead of rows, because an exchange of rows needs its counts on the host.

Shapes: P ranks of the group, X numbers for a rank.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moray.kernels.util.device import runtime
from moray.models.expert_parallel.all_to_all import AllToAll
from moray.models.expert_parallel.exchange_check import CorruptExchange


@dataclass(frozen=True)
class ExchangedCounts:
    """sent_PX and received_PX on the host, int64; received_on_device_PX: the latter where it arrived."""

    sent_PX: Tensor
    received_PX: Tensor
    received_on_device_PX: Tensor


class CountExchange:
    """A small all-to-all of X int64 per rank, and their sum, which the receiver checks.

    On a GPU the received counts are copied to the host on a separate stream, so reading them does not wait for kernels
    launched in the meantime.
    """

    def __init__(self, all_to_all: AllToAll, counts_PX: Tensor, layer: int) -> None:
        """counts_PX: the numbers for each rank. layer: to be named in errors."""
        self._sent_PX = torch.cat((counts_PX, check_sum(counts_PX)), dim=1)
        device = runtime(counts_PX.device)
        small = all_to_all.beside() if device.runs_ahead else all_to_all
        self._pending = small.start(self._sent_PX, None, None)
        self._side = device.side_stream()
        self._group, self._layer = all_to_all.group, layer

    def wait(self) -> ExchangedCounts:
        """Raises CorruptExchange on this rank if the received numbers do not have the sum that came with them."""
        with self._side:
            received_PX = self._pending.wait()
            both = torch.stack((self._sent_PX, received_PX)).cpu()  # the only sync, of this stream alone
        counts_PX = both[1, :, :-1]
        wrong_P = (check_sum(counts_PX) != both[1, :, -1:]).flatten().nonzero().flatten().tolist()
        if wrong_P:
            names = ", ".join(str(dist.get_global_rank(self._group, sender)) for sender in wrong_P)
            raise CorruptExchange(
                f"layer {self._layer}: rank {dist.get_rank()} received other row counts than ranks {names} sent"
            )
        return ExchangedCounts(both[0, :, :-1], counts_PX, received_PX[:, :-1])


def check_sum(counts_PX: Tensor) -> Tensor:
    """What follows the counts of each rank, [..., P, 1]: their sum, and 1 so that zeros are no valid counts."""
    return counts_PX.sum(-1, keepdim=True) + 1
