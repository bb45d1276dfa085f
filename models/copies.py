"""One copy of a row for each rank that has experts of its token, whatever their number: made here, expanded there.

A copy is the row's bytes, and after them a bit for each expert of the rank that it goes to. With DeepSeek-V3's eight
experts of at most four groups, a token sends half as many rows as it has experts, or fewer.

Shapes: T tokens, K slots, P ranks, L experts of a rank, E = P * L, C copies sent, A copies that arrive, R rows at the
experts here, N bytes of a row, B = ceil(L / 8).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moray.kernels.wire import pack_bits, unpack_bits


@dataclass(frozen=True)
class Copies:
    """The copies that a rank sends, rank by rank: visited_PTL, 1 for each expert that a token goes to, else 0."""

    visited_PTL: Tensor

    @classmethod
    def of(cls, ids_TK: Tensor, ranks: int, local: int) -> "Copies":
        """For tokens that go to the experts ids_TK, int64, no expert twice."""
        tokens = len(ids_TK)
        visited_TE = torch.zeros(tokens, ranks * local, dtype=torch.uint8, device=ids_TK.device)
        visited_TE.scatter_(1, ids_TK, 1)
        return cls(visited_TE.view(tokens, ranks, local).transpose(0, 1))

    def counts_P(self) -> Tensor:  # noqa: N802
        """How many go to each rank, int64."""
        return self.visited_PTL.any(-1).sum(1)

    def made(self, rows_TX: Tensor, count: int) -> Tensor:
        """The copies of these rows as bytes, uint8 [C, N + B]; `count` is C, which a device need not be asked for."""
        width = rows_TX.shape[1] * rows_TX.element_size()
        bytes_TN = rows_TX.reshape(-1).view(torch.uint8).view(-1, width)
        rank_C, source_C = torch.nonzero_static(self.visited_PTL.any(-1), size=count).unbind(1)
        bits_CB = pack_bits(self.visited_PTL[rank_C, source_C])
        return torch.cat((bytes_TN.index_select(0, source_C), bits_CB), dim=1)


def expand(arrived_AW: Tensor, like: Tensor, local: int, rows: int) -> Tensor:
    """The rows of copies that arrived (uint8 [A, N + B]), one for each bit.

    R = `rows` of them, by expert, then in the order of arrival; `like` has their columns and dtype.
    """
    width = arrived_AW.shape[1] - -(-local // 8)
    rows_AX = arrived_AW[:, :width].reshape(-1).view(like.dtype).view(-1, like.shape[1])
    visited_AL = unpack_bits(arrived_AW[:, width:], local)
    order_R2 = torch.nonzero_static(visited_AL.t(), size=rows)
    return rows_AX.index_select(0, order_R2[:, 1])
