"""Writes the tensors of one rank, and lists where they are.

torch.distributed.checkpoint plans every save anew: rank 0 receives the plans of all ranks, merges and checks them, and
pickles the index. Between the saves of a process the plan is the same: the same tensors of the same sizes in the same
order. So a rank plans once, and sends the others only a digest of its listing. `checkpoint_index.py` makes the index of
all listings when a digest changes (`benchmarks/checkpoint_plans.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from moray.pipelines.pretrain.checkpoint.checkpoint_index import StoredPlace, encode_listing
from moray.pipelines.pretrain.checkpoint.stored_part import StoredPart


class RankWriter:
    """Writes the checkpoints of rank `rank`. listing: of the last one, for `merge_listings`. digest: of the listing."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._parts: Mapping[str, StoredPart] = {}
        self._planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._plan = SavePlan([])
        self._places: dict[str, StoredPlace] = {}
        self.listing = b""
        self.digest = ""

    def write(self, parts: dict[str, StoredPart], writer: FileSystemWriter) -> None:
        """Writes all parts, by key. Plans only if `parts` is another object than before, or the first."""
        is_first = self._rank == 0
        if parts is not self._parts or not self.digest:
            self._planner.set_up_planner(parts, is_coordinator=is_first)
            self._plan = self._planner.create_local_plan()
            self._parts, self._places, self.digest = parts, {}, ""
        writer.set_up_storage_writer(is_first, rank=self._rank)
        # The writer names a rank's files by the position of its plan.
        before = [SavePlan([])] * self._rank
        plan = writer.prepare_global_plan([*before, writer.prepare_local_plan(self._plan)])[-1]
        self._list(writer.write_data(plan, self._planner).wait())

    def _list(self, results: list[WriteResult]) -> None:
        places = {one.index.fqn: StoredPlace.of(one.storage_data) for one in results}
        if places != self._places or not self.digest:
            self._places = places
            self.listing = encode_listing(self._parts, places)
            self.digest = hashlib.sha256(self.listing).hexdigest()
