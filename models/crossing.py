"""Rows on their way between ranks, while the ranks do something else.

Everything that communicates is begun here, and ended when it is needed. Who waits computes gradients of weights that
were put off (`kernels/deferred.py`), as long as there are any. On a GPU the host is ahead of the device, so it sees a
transfer end late, and hands over all that was put off: it runs beside the transfer all the same.

Shapes: P ranks, L experts of a rank, X columns of any meaning, W bytes, R rows here, S rows sent.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moray.kernels.deferred import DeferredGradients
from moray.kernels.permute import inverse_permutation
from moray.models.copies import Copies, expand

# Made for a device, and entered around every wait for others: whoever wants to know what communication takes.
Timed = Callable[[torch.device], AbstractContextManager[None]]
Arrival = Callable[[], Tensor]  # waits for a transfer that is under way; what arrived


def untimed(device: torch.device) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class Link:
    """How this rank exchanges rows with those of `group`."""

    group: dist.ProcessGroup
    timed: Timed = untimed
    later: DeferredGradients | None = None

    def exchange(self, rows: Tensor, sent: Sequence[int] | None, received: Sequence[int] | None) -> Arrival:
        """Begins to send so many rows to each rank, and to receive so many; None: equal numbers."""
        out = rows.new_empty((sum(received), *rows.shape[1:])) if received is not None else torch.empty_like(rows)
        rows = rows.contiguous()
        arriving, leaving = (None if of is None else list(of) for of in (received, sent))
        work = dist.all_to_all_single(out, rows, arriving, leaving, group=self.group, async_op=True)
        assert work is not None

        def arrived() -> Tensor:
            if self.later is not None:
                self.later.fill(work.is_completed)
            with self.timed(rows.device):
                work.wait()
            return out

        return arrived


class Announcement:
    """How many rows will come from whom: every rank tells every other, before it sends any.

    On a GPU, what was heard is copied to the host on a stream of its own, so that to read it is not to wait for what
    was launched meanwhile.
    """

    def __init__(self, link: Link, counts_E: Tensor, copies_P: Tensor) -> None:
        """counts_E: pairs of this rank for each expert of all ranks; copies_P: rows that it sends to each rank."""
        self._sent_PX = torch.cat((counts_E.view(len(copies_P), -1), copies_P.unsqueeze(1)), dim=1)
        self._arrival = link.exchange(self._sent_PX, None, None)
        self._side = torch.cuda.Stream() if counts_E.is_cuda else None  # type: ignore[no-untyped-call]

    def heard(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """From here, and to here: pairs for each expert of each rank, [P, L], and rows for each rank, [P]; on the
        host."""
        if self._side is None:
            both = torch.stack((self._sent_PX, self._arrival()))
        else:
            with torch.cuda.stream(self._side):
                both = torch.stack((self._sent_PX, self._arrival())).cpu()  # the one sync, of this stream alone
        return (both[0, :, :-1], both[0, :, -1]), (both[1, :, :-1], both[1, :, -1])


@dataclass(frozen=True)
class Crossing:
    """The part of a layer's way that lies between ranks.

    sent_P, received_P: rows to and from each rank, one for each pair of token and expert. order_R, inverse_R: from the
    order of arrival (rank by rank) to the order by local expert. copies: those sent on the way there,
    copied_P to each rank, and arriving_P come from each, for `local` experts here.
    """

    link: Link
    sent_P: tuple[int, ...]
    received_P: tuple[int, ...]
    order_R: Tensor
    inverse_R: Tensor
    copies: Copies
    copied_P: tuple[int, ...]
    arriving_P: tuple[int, ...]
    local: int

    @classmethod
    def of(
        cls, link: Link, copies: Copies, announcement: Announcement, device: torch.device
    ) -> tuple["Crossing", Tensor]:
        """The crossing that was announced, and the rows of each expert here, int64 on the host."""
        (sent_PL, copied_P), (received_PL, arriving_P) = announcement.heard()
        order_R = _arrival_order(received_PL).to(device)
        rows_sent, rows_received = sent_PL.sum(1).tolist(), received_PL.sum(1).tolist()
        crossing = cls(
            link, tuple(rows_sent), tuple(rows_received), order_R, inverse_permutation(order_R), copies,
            tuple(copied_P.tolist()), tuple(arriving_P.tolist()), received_PL.shape[1],
        )  # fmt: skip
        return crossing, received_PL.sum(0)

    def once(self, rows_TX: Tensor) -> Arrival:
        """A token's row to all its experts, by one copy for each rank."""
        copies_CW = self.copies.made(rows_TX, sum(self.copied_P))
        arrival = self.link.exchange(copies_CW, self.copied_P, self.arriving_P)
        like = rows_TX.new_empty(0, rows_TX.shape[1])
        return lambda: expand(arrival(), like, self.local, sum(self.received_P))

    def there(self, rows_SX: Tensor) -> Arrival:
        arrival = self.link.exchange(rows_SX, self.sent_P, self.received_P)
        return lambda: arrival().index_select(0, self.order_R)

    def back(self, rows_RX: Tensor) -> Arrival:
        return self.link.exchange(rows_RX.index_select(0, self.inverse_R), self.received_P, self.sent_P)


def _arrival_order(received_PL: Tensor) -> Tensor:
    """Rows arrive by rank, then by expert; the experts want them by expert, then by rank."""
    ranks, local = received_PL.shape
    experts_PL = torch.arange(local).repeat(ranks)
    return experts_PL.repeat_interleave(received_PL.flatten()).argsort(stable=True)
