"""The part of a layer's way that lies between ranks: who sends how much to whom, and in which order it arrives.

Shapes: P ranks, L experts of a rank, X columns of any meaning, W bytes, R rows here, S rows sent.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moray.kernels.permute import inverse_permutation
from moray.kernels.wire import pack_rows, packed_width
from moray.models.copies import Copies, expand
from moray.models.link import Arrival, Link


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
        return self._expanded(self.link.exchange(copies_CW, self.copied_P, self.arriving_P), rows_TX)

    def once_packed(self, rows_TD: Tensor) -> Arrival:
        """The same of rows in FP8, packed (`kernels/wire.py`)."""
        if self.link.memory is None:
            return self.once(pack_rows(rows_TD))
        arrival = self.link.push(rows_TD, self.copies.visited_PTL, self.copied_P, self.arriving_P)
        return self._expanded(arrival, rows_TD.new_empty(0, packed_width(rows_TD.shape[1]), dtype=torch.uint8))

    def _expanded(self, arrival: Arrival, like_TX: Tensor) -> Arrival:
        like_TX = like_TX.new_empty(0, like_TX.shape[1])
        return lambda: expand(arrival(), like_TX, self.local, sum(self.received_P))

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
