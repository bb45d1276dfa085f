"""Plans made once: torch reads what ranks write without a common plan, and errors reach all ranks."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from moray.pipelines.pretrain.checkpoint.checkpoint_index import (
    IndexFailed,
    StoredPlace,
    encode_listing,
    merge_listings,
)
from moray.pipelines.pretrain.checkpoint.rank_writer import RankWriter
from moray.pipelines.pretrain.checkpoint.stored_part import StoredPart
from tests.pipelines.pretrain.training_ranks import index_builds
from tests.ranks import RankPool

Parts = dict[str, StoredPart]


def split(whole: dict[str, torch.Tensor], ranks: int) -> list[Parts]:
    """Parts of each tensor for each rank; ranks beyond the elements get none."""
    parts: list[Parts] = [{} for _ in range(ranks)]
    for key, tensor in whole.items():
        offset = 0
        for rank, piece in enumerate(tensor.tensor_split(ranks)):
            if len(piece):
                parts[rank][key] = StoredPart(piece.clone(), offset, len(tensor))
            offset += len(piece)
    return parts


def listing_of(parts: Parts) -> bytes:
    return encode_listing(parts, {key: StoredPlace("__0_0.distcp", 10 * at, 10) for at, key in enumerate(parts)})


WHOLE = {
    "master/b.weight": torch.arange(7.0),
    "ema/a.weight": torch.arange(4.0).to(torch.bfloat16),
    "exp_avg_fp8/a.weight": torch.arange(5.0).to(torch.float8_e4m3fn),
    "position": torch.tensor([3, 4]),
}


@pytest.mark.parametrize("few", [0, 100], ids=["process", "thread"])
def test_torch_reads_what_ranks_wrote_with_plans_of_their_own(tmp_path: Path, few: int) -> None:
    """One rank holds nothing: a small model on many ranks."""
    at = tmp_path / "checkpoint"
    writers = [RankWriter(rank) for rank in range(9)]
    for writer, parts in zip(writers, split(WHOLE, 9), strict=True):
        writer.write(parts, FileSystemWriter(at))
    (at / ".metadata").write_bytes(merge_listings([writer.listing for writer in writers], few))
    found = {key: torch.zeros_like(tensor) for key, tensor in WHOLE.items()}
    dcp.load(found, checkpoint_id=at, no_dist=True)
    dcp_to_torch_save(at, tmp_path / "whole.pt")
    converted = torch.load(tmp_path / "whole.pt")
    assert converted.keys() == WHOLE.keys()
    for key, tensor in WHOLE.items():
        assert torch.equal(found[key].view(torch.uint8), tensor.view(torch.uint8)), key
        assert torch.equal(converted[key].view(torch.uint8), tensor.view(torch.uint8)), key


def test_the_index_is_that_of_torch_but_for_the_names_of_the_save(tmp_path: Path) -> None:
    parts = split(WHOLE, 1)[0]
    writer = RankWriter(0)
    writer.write(parts, FileSystemWriter(tmp_path / "ours"))
    ours = pickle.loads(merge_listings([writer.listing]))
    dcp.save(dict(parts), storage_writer=FileSystemWriter(tmp_path / "plain"), no_dist=True)
    plain = pickle.loads((tmp_path / "plain" / ".metadata").read_bytes())
    assert ours.storage_meta.checkpoint_id is None
    for name in ("state_dict_metadata", "planner_data", "storage_data", "version"):
        assert getattr(ours, name) == getattr(plain, name), name


keys = st.text(min_size=1, max_size=8)


@given(st.dictionaries(keys, st.integers(1, 9), max_size=6), st.integers(1, 5))
def test_the_index_of_any_split_is_what_the_planner_makes(sizes: dict[str, int], ranks: int) -> None:
    parts = split({key: torch.zeros(size) for key, size in sizes.items()}, ranks)
    found = pickle.loads(merge_listings([listing_of(mine) for mine in parts]))
    plans = []
    for mine in parts:
        planner = DefaultSavePlanner(flatten_state_dict=False)
        planner.set_up_planner(dict(mine))
        plans.append(planner.create_local_plan())
    _, expected = DefaultSavePlanner(flatten_state_dict=False).create_global_plan(plans)
    assert found.state_dict_metadata == expected.state_dict_metadata


@pytest.mark.parametrize("few", [0, 100], ids=["process", "thread"])
@pytest.mark.parametrize(("offset", "says"), [(0, "overlapping chunks"), (3, "invalid fill")])
def test_a_gap_or_an_overlap_is_an_error(few: int, offset: int, says: str) -> None:
    one = {"master/a": StoredPart(torch.zeros(2), 0, 5)}
    other = {"master/a": StoredPart(torch.zeros(2), offset, 5), "master/b": StoredPart(torch.zeros(1), 0, 1)}
    if offset == 0:  # torch keeps only one of two parts with the same offset
        other["master/a"] = StoredPart(torch.zeros(4), 1, 5)
    with pytest.raises(IndexFailed, match=says):
        merge_listings([listing_of(one), listing_of(other)], few)


def test_a_process_that_dies_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(IndexFailed, match="exit code 1"):
        merge_listings([listing_of({})], few=-1)


def test_a_rank_plans_again_only_if_its_parts_change(tmp_path: Path) -> None:
    writer, parts = RankWriter(0), split(WHOLE, 1)[0]
    seen = []
    for step, copy in enumerate((parts, parts, dict(parts), {"master/c": StoredPart(torch.zeros(3), 0, 3)})):
        plan = writer._plan
        writer.write(copy, FileSystemWriter(tmp_path / str(step)))
        seen.append((writer.digest, writer._plan is plan))
    (first, _), (second, kept), (third, planned), (fourth, _) = seen
    assert first == second == third != fourth
    assert (kept, planned) == (True, False)


def test_the_index_is_made_once_and_its_errors_reach_all_ranks(ranks: RankPool, tmp_path: Path) -> None:
    """The first index fails on rank 0: every rank reports it, and the next save makes another."""
    by_rank = ranks.run(2, index_builds, str(tmp_path), 4)
    assert [built for built, _ in by_rank] == [2, 0]
    for _, errors in by_rank:
        assert errors == ["no index", "", "", ""]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000003", "step-00000004"]
