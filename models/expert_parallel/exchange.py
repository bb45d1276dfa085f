"""The part of a layer's way that lies between ranks: rows to the ranks of their experts, and sums of results home.

In FP8 training, rows go in FP8 (`kernels/wire.py`), forward those of tokens, backward the gradients of results. What
comes home comes in the rows' own dtype (DeepSeek-V3 §3.3.3), summed by its rank.

A row crosses once to each rank that has any of its token's experts (`copies.py`). Forward, the ids of all its experts
and the router's weights go with it.

Shapes: T tokens here, A rows that arrive, K slots, P ranks, E experts, L experts here, C copies, D hidden size, N bytes
of a tail.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moray.kernels.wire import pack_rows, packed_width, unpack_rows
from moray.models.expert_parallel.all_to_all import Arrival, Link
from moray.models.expert_parallel.expert_permutation import Spread
from moray.models.expert_parallel.send_plan import Copies
from moray.models.expert_parallel.stages import Routing


class Load(NamedTuple):
    """What is on its way: rows, [T, D] or [A, D], and a number for each of their slots, [T, K] or [A, K], or none."""

    rows: Tensor
    weights: Tensor | None


Arrivals = Callable[[], Load]  # waits for a transfer that is under way; what arrived


class Crossing(Protocol):
    """Of one layer's rows. Each call is a departure. The first brings the weights there; forward and backward go the
    same ways, so others may follow without."""

    def there(self, load: Load) -> Arrivals:
        """Sends tokens' rows to the ranks of their experts."""

    def back(self, load: Load) -> Arrivals:
        """Sends what came of the rows that arrived, in their order, to where they are from, and sums it there."""

    def counts_L(self) -> Tensor:  # noqa: N802
        """Rows of each expert here, int64; known once rows have departed. On the host, if that is where it was
        heard."""

    def spread(self) -> Spread:
        """Of the rows that arrived, over the experts here; known once they have."""


class Here:
    """All experts are here, and nothing crosses. Rows are rounded to FP8 all the same, so that what is computed depends
    on the number of ranks as little as it can."""

    def __init__(self, routing: Routing, fp8: bool) -> None:
        self._ids_TK, self._counts_E, self._fp8 = routing.ids_TK, routing.counts_E, fp8

    def there(self, load: Load) -> Arrivals:
        rows_TD, weights_TK = load
        if self._fp8:
            rows_TD = unpack_rows(pack_rows(rows_TD), rows_TD.shape[1], rows_TD.dtype)
        return lambda: Load(rows_TD, weights_TK)

    def back(self, load: Load) -> Arrivals:
        return lambda: load

    def counts_L(self) -> Tensor:  # noqa: N802
        return self._counts_E

    def spread(self) -> Spread:
        return Spread.of(self._ids_TK, len(self._counts_E), self._ids_TK.numel())


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

    def heard(self) -> tuple[list[int], list[int], Tensor]:
        """(copies to each rank, copies from each, rows of each expert here, int64), on the host."""
        if self._side is None:
            both = torch.stack((self._sent_PX, self._arrival()))
        else:
            with torch.cuda.stream(self._side):
                both = torch.stack((self._sent_PX, self._arrival())).cpu()  # the one sync, of this stream alone
        return both[0, :, -1].tolist(), both[1, :, -1].tolist(), both[1, :, :-1].sum(0)


class ExchangeCrossing:
    """By the exchanges of a `Link`. There is one more, small and first, of counts, since an exchange of rows needs its
    split sizes on the host."""

    def __init__(self, link: Link, routing: Routing, experts: range, ranks: int, fp8: bool) -> None:
        self._link, self._ids_TK, self._experts, self._fp8 = link, routing.ids_TK, experts, fp8
        self._copies = Copies.of(routing.ids_TK, ranks, len(experts))
        self._announcement = Announcement(link, routing.counts_E, self._copies.counts_P())
        self._heard: tuple[list[int], list[int], Tensor] | None = None
        self._ids_AK: Tensor | None = None

    def there(self, load: Load) -> Arrivals:
        if self._heard is None:
            self._heard = self._announcement.heard()
        sent, received, _ = self._heard
        rows_TD, weights_TK = load
        tails_TN = self._tails(rows_TD, weights_TK)
        if self._fp8 and self._link.memory is not None:
            arrival = self._link.push(rows_TD, tails_TN, self._copies.goes_PT, sent, received)
        else:
            bytes_TX = torch.cat((pack_rows(rows_TD) if self._fp8 else _bytes(rows_TD), tails_TN), dim=1)
            arrival = self._link.exchange(self._copies.made(bytes_TX, sum(sent)), sent, received)
        return self._unpacked(arrival, load)

    def back(self, load: Load) -> Arrivals:
        assert self._heard is not None
        sent, received, _ = self._heard
        rows_AD, weights_AK = load
        if weights_AK is None:
            arrival = self._link.exchange(rows_AD, received, sent)
            return lambda: Load(self._copies.sums(arrival()), None)
        bytes_AX = torch.cat((_bytes(rows_AD), _bytes(weights_AK)), dim=1)
        arrival, dtypes = self._link.exchange(bytes_AX, received, sent), (rows_AD.dtype, weights_AK.dtype)
        width = rows_AD.shape[1] * rows_AD.element_size()

        def summed() -> Load:
            parts_CX = arrival().tensor_split([width], dim=1)
            numbers = (_numbers(part_CX, dtype) for part_CX, dtype in zip(parts_CX, dtypes, strict=True))
            return Load(*map(self._copies.sums, numbers))

        return summed

    def counts_L(self) -> Tensor:  # noqa: N802
        assert self._heard is not None, "rows are sent first"
        return self._heard[2]

    def spread(self) -> Spread:
        assert self._ids_AK is not None, "rows arrive first"
        return Spread.of(self._ids_AK, len(self._experts), int(self.counts_L().sum()))

    def _tails(self, rows_TD: Tensor, weights_TK: Tensor | None) -> Tensor:
        """What goes with the rows: uint8 [T, N]."""
        if weights_TK is None:
            return rows_TD.new_empty((len(rows_TD), 0), dtype=torch.uint8)
        return torch.cat((_bytes(self._ids_TK.int()), _bytes(weights_TK)), dim=1)

    def _unpacked(self, arrival: Arrival, load: Load) -> Arrivals:
        (_, columns), dtype = load.rows.shape, load.rows.dtype
        width = packed_width(columns) if self._fp8 else columns * dtype.itemsize
        weights_TK = load.weights
        slots, weights_dtype = (0, dtype) if weights_TK is None else (weights_TK.shape[1], weights_TK.dtype)

        def unpacked() -> Load:
            bytes_AX = arrival()
            row_bytes = bytes_AX[:, :width]
            rows_AD = unpack_rows(row_bytes, columns, dtype) if self._fp8 else _numbers(row_bytes, dtype)
            if not slots:
                return Load(rows_AD, None)
            ids_bytes, weights_bytes = bytes_AX[:, width:].tensor_split([slots * torch.int32.itemsize], dim=1)
            ids_AK = _numbers(ids_bytes, torch.int32) - self._experts.start
            self._ids_AK = torch.where((ids_AK >= 0) & (ids_AK < len(self._experts)), ids_AK, -1)
            return Load(rows_AD, _numbers(weights_bytes, weights_dtype))

        return unpacked


def _bytes(rows_XD: Tensor) -> Tensor:
    if not len(rows_XD):  # its last stride may be any
        return rows_XD.new_empty((0, rows_XD.shape[1] * rows_XD.element_size()), dtype=torch.uint8)
    return rows_XD.contiguous().view(torch.uint8)


def _numbers(bytes_XN: Tensor, dtype: torch.dtype) -> Tensor:
    return bytes_XN.clone(memory_format=torch.contiguous_format).view(dtype)
