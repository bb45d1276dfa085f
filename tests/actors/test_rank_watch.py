"""Who hangs: the judgement, as a pure function of what ranks said and when."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from moray.actors.rank_watch import Beat, Judge, Member, ProcessPlace, RankWatch, Waiting
from moray.platform.core.processes import Process

LIMIT = 10.0
EXCHANGE = Waiting("gloo:all_to_all", "experts", 7)


def judge_of(beats: dict[int, Beat], world: int | None = None) -> Judge:
    """All ranks having spoken at time 0."""
    judge = Judge(world or len(beats), LIMIT)
    for rank, beat in beats.items():
        judge.hear(0.0, rank, beat)
    return judge


def repeat(judge: Judge, beats: dict[int, Beat], until: float) -> None:
    for second in range(1, int(until) + 1):
        for rank, beat in beats.items():
            judge.hear(float(second), rank, beat)


def test_a_stopped_process_is_named_with_what_the_others_wait_in() -> None:
    beats = {0: Beat(4, 40, EXCHANGE), 1: Beat(4, 39), 2: Beat(4, 40, EXCHANGE)}
    judge = judge_of(beats)
    repeat(judge, {0: beats[0], 2: beats[2]}, 11)
    verdict = judge.verdict(11.0)
    assert verdict is not None
    assert verdict.ranks == (1,)
    assert verdict.text == (
        "rank 1 is silent for 11 s; ranks 0, 2 waiting in gloo:all_to_all number 7 of group experts, at step 5"
    )


def test_a_rank_that_is_stuck_elsewhere_is_named() -> None:
    beats = {0: Beat(4, 40, EXCHANGE), 1: Beat(4, 40, EXCHANGE), 2: Beat(4, 39)}
    judge = judge_of(beats)
    repeat(judge, beats, 11)
    verdict = judge.verdict(11.0)
    assert verdict is not None
    assert verdict.ranks == (2,)
    assert "rank 2 is stuck for 11 s; ranks 0, 1 waiting in" in verdict.text


def test_of_ranks_that_all_wait_the_one_behind_is_named() -> None:
    behind = Beat(4, 38, Waiting("gloo:all_reduce", "replicas of experts", 3))
    beats = {0: Beat(4, 40, EXCHANGE), 1: behind, 2: Beat(4, 40, EXCHANGE)}
    judge = judge_of(beats)
    repeat(judge, beats, 11)
    verdict = judge.verdict(11.0)
    assert verdict is not None
    assert verdict.ranks == (1,)


@given(st.integers(2, 16), st.booleans(), st.randoms(use_true_random=False))
def test_equal_ranks_are_never_blamed(world: int, recorded: bool, random: Any) -> None:
    """Whoever spoke first: with NCCL the recorder of gloo holds the few collectives before training, on every rank."""
    ranks = list(range(world))
    random.shuffle(ranks)
    beats = {rank: Beat(41, 3, EXCHANGE if recorded else None) for rank in ranks}
    judge = judge_of(beats)
    assert judge.complaint(1.0) == ""
    repeat(judge, beats, 11)
    assert judge.verdict(11.0) is None
    assert "no progress for 11 s, and nothing tells which rank is at fault" in judge.complaint(11.0)


def test_a_rank_alone_that_stands_still_is_ended() -> None:
    judge = judge_of({0: Beat(4, 0)})
    repeat(judge, {0: Beat(4, 0)}, 11)
    verdict = judge.verdict(11.0)
    assert verdict is not None
    assert verdict.ranks == (0,)
    assert judge.complaint(11.0) == ""


def test_counts_of_ranks_that_do_not_wait_tell_nothing() -> None:
    beats = {0: Beat(4, 4), 1: Beat(4, 3), 2: Beat(4, 4)}
    judge = judge_of(beats)
    repeat(judge, beats, 11)
    assert judge.verdict(11.0) is None
    assert "no rank waits in a recorded collective, at step 5" in judge.complaint(11.0)


def test_a_standstill_without_a_culprit_is_warned_of_once(tmp_path: Path) -> None:
    watch = RankWatch(LIMIT, str(tmp_path), "pretrain")
    members = [Member("team", 2, rank, ProcessPlace("node", Process(100, "boot:1"))) for rank in (0, 1)]
    for member in members:
        watch.beat(member, Beat(4, 40))
    now = time.monotonic()
    assert watch.complained(now) == ""
    late = now + LIMIT - 0.1  # not yet silent, by a beat of just now
    watch._judge._progress = now - LIMIT  # type: ignore[union-attr]
    assert "no progress" in watch.complained(late)
    assert watch.complained(late) == "", "said once"
    watch.beat(member, Beat(5, 44))
    assert watch.complained(late) == ""
    watch.leave("team")  # its thread judges too


def test_nobody_hangs_before_all_have_spoken_or_while_one_is_busy() -> None:
    assert judge_of({0: Beat(0, 1)}, world=2).verdict(1000.0) is None
    beats = {0: Beat(4, 40, EXCHANGE), 1: Beat(4, 39, busy="writing a checkpoint")}
    judge = judge_of(beats)
    repeat(judge, beats, 100)
    assert judge.verdict(100.0) is None
    repeat(judge, {0: beats[0]}, 120)
    assert judge.verdict(120.0) is not None, "busy or not, a silent rank hangs"


@given(st.lists(st.integers(0, 3), min_size=20, max_size=60))
def test_who_makes_progress_and_speaks_never_hangs(order: list[int]) -> None:
    """Whatever the order in which ranks are heard, as long as each is within the limit."""
    judge = judge_of({rank: Beat(0, 0) for rank in range(4)})
    for second, rank in enumerate(order, start=1):
        judge.hear(second * 1.0, rank, Beat(second // 10, second, EXCHANGE if second % 2 else None))
        for other in range(4):
            if other != rank:
                judge.hear(second * 1.0, other, Beat(second // 10, second - 1, EXCHANGE))
        assert judge.verdict(second + LIMIT / 2) is None


def test_a_watch_that_was_started_again_goes_on_with_the_team_that_beats(tmp_path: Path) -> None:
    """Others of the team before may still be heard of: they neither count nor displace it."""
    watch = RankWatch(LIMIT, str(tmp_path), "pretrain")

    def beat(team: str, rank: int) -> None:
        watch.beat(Member(team, 2, rank, ProcessPlace("node", Process(100 + rank, "boot:1"))), Beat(4, 40))

    beat("before", 0)
    beat("now", 0)
    beat("before", 1)
    assert watch.judged(math.inf) is None, "rank 1 of the team has not spoken"
    beat("now", 1)
    watch.leave("before")
    judged = watch.judged(math.inf)
    assert judged is not None
    verdict, places = judged
    assert verdict.ranks == (0, 1)
    assert [place.process.pid for place in places] == [100, 101]
    beat("now", 0)
    assert watch.judged(math.inf) is None, "said once"


def test_who_has_left_is_not_judged(tmp_path: Path) -> None:
    watch = RankWatch(LIMIT, str(tmp_path), "pretrain")
    watch.beat(Member("team", 1, 0, ProcessPlace("node", Process(100, "boot:1"))), Beat(4, 40))
    watch.leave("team")
    watch.beat(Member("team", 1, 0, ProcessPlace("node", Process(100, "boot:1"))), Beat(4, 41))
    assert watch.judged(math.inf) is None
