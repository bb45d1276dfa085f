"""The work files that the phases of dedup exchange, by kind. PHASES (phases.py) lists the readers and the writer.

    kind                         one for each        contents
    sketches                     shard (a folder)    ids, hashes, lengths of documents and their band keys, by range
    copies, originals            range of hashes     numbers of exact copies, ascending; the original of each
    seen_hashes                  range of hashes     numbers of documents whose text is in a Bloom filter
    members                      run                 bool by number: whether a document's keys are compared
    pairs                        range of a band     [E, 2] numbers of documents that share a key, ascending in a pair
    forest                       level, range        [F, 2] a spanning forest of these pairs
    seen_keys                    range of a band     numbers of documents whose key is in a Bloom filter
    numbers, groups              run                 numbers of candidates, ascending; the group of each
    known, seen                  run                 [K, 2] pairs known to be duplicates; numbers in a Bloom filter
    candidates                   shard               candidates with shingles, a batch for each group
    grouped_pairs, pair_groups   some ranges         their pairs by group; the group of each
    group_decisions, decisions   group; run          rows of decide.DECIDED

Documents are numbered consecutively over the shards of all runs with this index. The counts of each task are in its
record, in the same folder (`shared/task_records.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moray.platform.store.paths import AnyPath

FileKind = Literal[
    "sketches",
    "copies",
    "originals",
    "seen_hashes",
    "members",
    "pairs",
    "forest",
    "seen_keys",
    "numbers",
    "groups",
    "known",
    "seen",
    "candidates",
    "grouped_pairs",
    "pair_groups",
    "group_decisions",
    "decisions",
]
_NAMES: dict[FileKind, str] = {
    "sketches": "sketches",
    "copies": "copies-{:05d}.npy",
    "originals": "originals-{:05d}.npy",
    "seen_hashes": "seen-hashes-{:05d}.npy",
    "members": "members.npy",
    "pairs": "pairs-{:06d}.npy",
    "forest": "forest-{}-{:06d}.npy",
    "seen_keys": "seen-keys-{:06d}.npy",
    "numbers": "numbers.npy",
    "groups": "groups.npy",
    "known": "known.npy",
    "seen": "seen.npy",
    "candidates": "part-{:05d}.arrow",
    "grouped_pairs": "grouped-pairs-{:05d}.npy",
    "pair_groups": "grouped-groups-{:05d}.npy",
    "group_decisions": "decided-{:06d}.arrow",
    "decisions": "decided.arrow",
}


@dataclass(frozen=True)
class PhaseFiles:
    """The work files of one phase, below `folder`. Raises ValueError for a kind that the phase does not declare."""

    folder: AnyPath
    reads: frozenset[FileKind]
    writes: frozenset[FileKind]

    def read(self, kind: FileKind, *numbers: int) -> AnyPath:
        """A file of an earlier phase, or of this one."""
        if kind not in self.reads | self.writes:
            raise ValueError(f"this phase does not read {kind}")
        return self._path(kind, numbers)

    def write(self, kind: FileKind, *numbers: int) -> AnyPath:
        """A file that this phase writes. A rerun reuses it if it is complete."""
        if kind not in self.writes:
            raise ValueError(f"this phase does not write {kind}")
        return self._path(kind, numbers)

    def _path(self, kind: FileKind, numbers: tuple[int, ...]) -> AnyPath:
        return self.folder / _NAMES[kind].format(*numbers)
