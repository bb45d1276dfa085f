"""Document boundaries in packed rows of tokens.

A document is a run of equal ids in a row. If an id occurs again later in the row, it is another document, so a data
loader may number documents arbitrarily.

Shapes: B rows, T tokens of a row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DocumentBounds:
    """The documents of one packed batch.

    positions_BT: int64, each token's position within its document. index_BT: int64, the index of the token's document
    within its row, from 0. lengths: the documents' lengths, row by row, if known without a device sync (on the CPU),
    else None.
    """

    positions_BT: Tensor
    index_BT: Tensor
    lengths: tuple[int, ...] | None


def find_documents(document_ids_BT: Tensor) -> DocumentBounds:
    """Splits every row into runs of equal ids."""
    first_BT = torch.ones_like(document_ids_BT, dtype=torch.bool)
    first_BT[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    places_T = torch.arange(document_ids_BT.shape[1], device=document_ids_BT.device)
    starts_BT = torch.where(first_BT, places_T, 0).cummax(dim=1).values
    lengths = None
    if document_ids_BT.device.type == "cpu":
        # A row's first token always starts a document, so runs of the flattened batch never cross rows.
        begins = first_BT.flatten().nonzero().flatten()
        end = begins.new_tensor([first_BT.numel()])
        lengths = tuple(torch.diff(begins, append=end).tolist())
    return DocumentBounds(places_T - starts_BT, first_BT.cumsum(1) - 1, lengths)
