"""Detection of hung ranks, as a pure function of their reports and times."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from moray.actors.rank_watch import Beat, HangDetector, Member, ProcessPlace, RankWatch, Waiting
from moray.platform.core.processes import Process

LIMIT = 10.0
EXCHANGE = Waiting("gloo:all_to_all", "experts", 7)


def detector_of(beats: dict[int, Beat], world: int | None = None) -> HangDetector:
    """A detector with a report of every rank at time 0."""
    detector = HangDetector(world or len(beats), LIMIT)
    for rank, beat in beats.items():
        detector.record(0.0, rank, beat)
    return detector


def repeat(detector: HangDetector, beats: dict[int, Beat], until: float) -> None:
    for second in range(1, int(until) + 1):
        for rank, beat in beats.items():
            detector.record(float(second), rank, beat)


def test_a_stopped_process_is_named_with_the_collective_that_the_others_wait_in() -> None:
    beats = {0: Beat(4, 40, EXCHANGE), 1: Beat(4, 39), 2: Beat(4, 40, EXCHANGE)}
    detector = detector_of(beats)
    repeat(detector, {0: beats[0], 2: beats[2]}, 11)
    hang = detector.hang(11.0)
    assert hang is not None
    assert hang.ranks == (1,)
    assert hang.text == (
        "rank 1 has not reported for 11 s; ranks 0, 2 waiting in gloo:all_to_all number 7 of group experts, at step 5"
    )


def test_a_rank_that_is_stuck_elsewhere_is_named() -> None:
    beats = {0: Beat(4, 40, EXCHANGE), 1: Beat(4, 40, EXCHANGE), 2: Beat(4, 39)}
    detector = detector_of(beats)
    repeat(detector, beats, 11)
    hang = detector.hang(11.0)
    assert hang is not None
    assert hang.ranks == (2,)
    assert "rank 2 is stuck for 11 s; ranks 0, 1 waiting in" in hang.text


def test_of_ranks_that_all_wait_the_one_behind_is_named() -> None:
    behind = Beat(4, 38, Waiting("gloo:all_reduce", "replicas of experts", 3))
    beats = {0: Beat(4, 40, EXCHANGE), 1: behind, 2: Beat(4, 40, EXCHANGE)}
    detector = detector_of(beats)
    repeat(detector, beats, 11)
    hang = detector.hang(11.0)
    assert hang is not None
    assert hang.ranks == (1,)


@given(st.integers(2, 16), st.booleans(), st.randoms(use_true_random=False))
def test_equal_ranks_are_never_reported_as_hung(world: int, recorded: bool, random: Any) -> None:
    """In any order: with NCCL, gloo's recorder holds the few collectives before training, on every rank."""
    ranks = list(range(world))
    random.shuffle(ranks)
    beats = {rank: Beat(41, 3, EXCHANGE if recorded else None) for rank in ranks}
    detector = detector_of(beats)
    assert detector.warning(1.0) == ""
    repeat(detector, beats, 11)
    assert detector.hang(11.0) is None
    assert "no progress for 11 s, and the hung rank cannot be determined" in detector.warning(11.0)


def test_a_single_stalled_rank_is_reported() -> None:
    detector = detector_of({0: Beat(4, 0)})
    repeat(detector, {0: Beat(4, 0)}, 11)
    hang = detector.hang(11.0)
    assert hang is not None
    assert hang.ranks == (0,)
    assert detector.warning(11.0) == ""


def test_counts_of_ranks_that_do_not_wait_are_ignored() -> None:
    beats = {0: Beat(4, 4), 1: Beat(4, 3), 2: Beat(4, 4)}
    detector = detector_of(beats)
    repeat(detector, beats, 11)
    assert detector.hang(11.0) is None
    assert "no rank waits in a recorded collective, at step 5" in detector.warning(11.0)


def test_a_stall_without_a_known_hung_rank_is_one_warning(tmp_path: Path) -> None:
    watch = RankWatch(LIMIT, str(tmp_path), "pretrain")
    members = [Member("team", 2, rank, ProcessPlace("node", Process(100, "boot:1"))) for rank in (0, 1)]
    for member in members:
        watch.beat(member, Beat(4, 40))
    now = time.monotonic()
    assert watch.new_warning(now) == ""
    late = now + LIMIT - 0.1  # not yet silent, by a beat of just now
    watch._detector._progress = now - LIMIT  # type: ignore[union-attr]
    assert "no progress" in watch.new_warning(late)
    assert watch.new_warning(late) == "", "reported once"
    watch.beat(member, Beat(5, 44))
    assert watch.new_warning(late) == ""
    watch.leave("team")  # its thread looks for hangs too


def test_no_rank_hangs_before_all_have_reported_or_while_one_is_busy() -> None:
    assert detector_of({0: Beat(0, 1)}, world=2).hang(1000.0) is None
    beats = {0: Beat(4, 40, EXCHANGE), 1: Beat(4, 39, busy="writing a checkpoint")}
    detector = detector_of(beats)
    repeat(detector, beats, 100)
    assert detector.hang(100.0) is None
    repeat(detector, {0: beats[0]}, 120)
    assert detector.hang(120.0) is not None, "a silent rank hangs, busy or not"


@given(st.lists(st.integers(0, 3), min_size=20, max_size=60))
def test_a_rank_that_makes_progress_and_reports_never_hangs(order: list[int]) -> None:
    """In any order of reports, as long as each is within the limit."""
    detector = detector_of({rank: Beat(0, 0) for rank in range(4)})
    for second, rank in enumerate(order, start=1):
        detector.record(second * 1.0, rank, Beat(second // 10, second, EXCHANGE if second % 2 else None))
        for other in range(4):
            if other != rank:
                detector.record(second * 1.0, other, Beat(second // 10, second - 1, EXCHANGE))
        assert detector.hang(second + LIMIT / 2) is None


def test_a_restarted_watch_continues_with_the_current_team(tmp_path: Path) -> None:
    """Late beats of an earlier team neither count nor replace the current team."""
    watch = RankWatch(LIMIT, str(tmp_path), "pretrain")

    def beat(team: str, rank: int) -> None:
        watch.beat(Member(team, 2, rank, ProcessPlace("node", Process(100 + rank, "boot:1"))), Beat(4, 40))

    beat("before", 0)
    beat("now", 0)
    beat("before", 1)
    assert watch.new_hang(math.inf) is None, "rank 1 of the team has not reported"
    beat("now", 1)
    watch.leave("before")
    found = watch.new_hang(math.inf)
    assert found is not None
    hang, places = found
    assert hang.ranks == (0, 1)
    assert [place.process.pid for place in places] == [100, 101]
    beat("now", 0)
    assert watch.new_hang(math.inf) is None, "reported once"


def test_a_node_is_blamed_from_its_second_hang_on(tmp_path: Path) -> None:
    watch = RankWatch(LIMIT, str(tmp_path), "pretrain")
    for team, expected in (("one", ([], 1)), ("two", (["bad"], 2))):
        for rank, node in enumerate(("good", "bad", "bad")):
            watch.beat(Member(team, 3, rank, ProcessPlace(node, Process(100 + rank, "boot:1"))), Beat(4, 40))
        late = time.monotonic() + 2 * LIMIT
        detector = watch._detector
        assert detector is not None
        detector.record(late, 0, Beat(4, 40))
        assert watch.new_hang(late) is not None
        assert watch.blamed() == expected


def test_a_team_that_has_left_is_not_watched(tmp_path: Path) -> None:
    watch = RankWatch(LIMIT, str(tmp_path), "pretrain")
    watch.beat(Member("team", 1, 0, ProcessPlace("node", Process(100, "boot:1"))), Beat(4, 40))
    watch.leave("team")
    watch.beat(Member("team", 1, 0, ProcessPlace("node", Process(100, "boot:1"))), Beat(4, 41))
    assert watch.new_hang(math.inf) is None
