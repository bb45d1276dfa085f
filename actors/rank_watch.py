"""Who hangs: a judgement over what ranks say of themselves, and a Ray actor that acts on it.

Every rank has a thread that tells, about ten times in `limit` seconds, how far its process is: steps taken, collectives
begun, and the one it waits in. A stopped process, or one on a host that is gone, tells nothing; one that is stuck
elsewhere is not in the collective that the others wait in. The actor ends the culprit with SIGKILL, because whoever
started the ranks notices a dead process and not a stopped one, and writes down why.

Where all ranks stand still alike, or their collectives are not recorded, nothing tells which one is at fault. Then no
rank is ended: a warning says so, and the process group's own timeout decides.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moray.platform.core.events import EventLog, NoteEvent
from moray.platform.core.processes import Process


@dataclass(frozen=True)
class Waiting:
    """The collective that a rank waits in: its operation, its group, and its number in the group."""

    operation: str
    group: str
    number: int


@dataclass(frozen=True)
class Beat:
    """What a rank says: its next step, how many collectives it has begun, the one it waits in; `busy`: with something
    that may take long without a collective, such as a checkpoint."""

    step: int
    begun: int
    waiting: Waiting | None = None
    busy: str = ""


@dataclass(frozen=True)
class Blame:
    """Ranks that hold up the others, and the words for it."""

    ranks: tuple[int, ...]
    text: str


class Judge:
    """Pure: beats and times in, a verdict out. `limit`: seconds without progress that are one too many."""

    def __init__(self, world: int, limit: float) -> None:
        self._world, self._limit = world, limit
        self._beats: dict[int, tuple[float, Beat]] = {}
        self._progress = 0.0

    def hear(self, now: float, rank: int, beat: Beat) -> None:
        before = self._beats.get(rank)
        if before is None or before[1] != beat:
            self._progress = now
        self._beats[rank] = (now, beat)

    def verdict(self, now: float) -> Blame | None:
        """Who hangs, if anybody does and it can be told; nobody before every rank has spoken."""
        if len(self._beats) < self._world:
            return None
        beats = {rank: beat for rank, (_, beat) in self._beats.items()}
        silent = [rank for rank, (heard, _) in self._beats.items() if now - heard > self._limit]
        if silent:
            quiet = max(now - self._beats[rank][0] for rank in silent)
            return Blame(tuple(silent), f"{_names(silent)} silent for {quiet:.0f} s; {_others(beats, silent)}")
        stood = self._stood_still(now)
        ranks = _behind(beats) if stood else []
        if not ranks:
            return None
        return Blame(tuple(ranks), f"{_names(ranks)} stuck for {stood:.0f} s; {_others(beats, ranks)}")

    def complaint(self, now: float) -> str:
        """What to warn of where all ranks stand still and nobody can be blamed (`verdict` is None); else empty."""
        stood = self._stood_still(now)
        if not stood or self.verdict(now) is not None:
            return ""
        beats = {rank: beat for rank, (_, beat) in self._beats.items()}
        return (
            f"training has made no progress for {stood:.0f} s, and nothing tells which rank is at fault; "
            f"{_others(beats, [])}"
        )

    def _stood_still(self, now: float) -> float:
        """Seconds without progress of any rank, if they exceed the limit and no rank is busy; else 0."""
        busy = any(beat.busy for _, beat in self._beats.values())
        stood = now - self._progress
        return stood if len(self._beats) == self._world and not busy and stood > self._limit else 0.0


def _behind(beats: Mapping[int, Beat]) -> list[int]:
    """The ranks that others wait for; empty where the collectives do not tell. A rank alone has nobody to wait for."""
    if len(beats) == 1:
        return list(beats)
    waiting = [rank for rank, beat in beats.items() if beat.waiting]
    if 0 < len(waiting) < len(beats):
        return [rank for rank in beats if rank not in waiting]
    fewest = min(beat.begun for beat in beats.values())
    behind = [rank for rank, beat in beats.items() if beat.begun == fewest]
    # Counts tell something only of ranks that wait: an idle recorder counts the few collectives before training.
    return behind if waiting and len(behind) < len(beats) else []


def _names(ranks: list[int]) -> str:
    return f"rank {ranks[0]} is" if len(ranks) == 1 else f"ranks {', '.join(map(str, sorted(ranks)))} are"


def _others(beats: Mapping[int, Beat], but: list[int]) -> str:
    """What the other ranks wait in, and at which step."""
    waiting: dict[Waiting, list[int]] = {}
    for rank, beat in beats.items():
        if rank not in but and beat.waiting:
            waiting.setdefault(beat.waiting, []).append(rank)
    step = max(beat.step for beat in beats.values()) + 1
    if not waiting:
        return f"no {'other ' if but else ''}rank waits in a recorded collective, at step {step}"
    what, ranks = max(waiting.items(), key=lambda item: len(item[1]))
    who = "rank" if len(ranks) == 1 else "ranks"
    return (
        f"{who} {', '.join(map(str, sorted(ranks)))} waiting in {what.operation} number {what.number} of group "
        f"{what.group}, at step {step}"
    )


@dataclass(frozen=True)
class ProcessPlace:
    """Where a rank's process is."""

    node: str
    process: Process


@dataclass(frozen=True)
class Member:
    """A rank of a team, which is one start of all ranks."""

    team: str
    world: int
    rank: int
    place: ProcessPlace


class RankWatch:
    """The actor: judges every half second, and ends who hangs. Wrapped by `start_watch`.

    Every beat says whose it is, so a watch that died and was started again goes on.
    """

    def __init__(self, limit: float, events: str, step: str) -> None:
        self._limit, self._events, self._step = limit, events, step
        self._teams: list[str] = []  # the last is the one that trains
        self._judge: Judge | None = None
        self._places: dict[int, ProcessPlace] = {}
        self._warned = False  # of the standstill that lasts
        self._lock = threading.Lock()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def beat(self, member: Member, beat: Beat) -> None:
        """A new team takes the place of the one before, of which a beat may still arrive."""
        with self._lock:
            if member.team not in self._teams:
                self._teams.append(member.team)
                self._judge, self._places = Judge(member.world, self._limit), {}
            if member.team == self._teams[-1] and self._judge is not None:
                self._places[member.rank] = member.place
                self._judge.hear(time.monotonic(), member.rank, beat)

    def leave(self, team: str) -> None:
        """The team has done its work: nobody of it hangs."""
        with self._lock:
            if team in self._teams[-1:]:
                self._judge = None

    def judged(self, now: float) -> tuple[Blame, list[ProcessPlace]] | None:
        """Who hangs, if anybody does, and where they are. Said once: then the next team is waited for."""
        with self._lock:
            verdict = self._judge.verdict(now) if self._judge else None
            if verdict is None:
                return None
            self._judge = None
            return verdict, [self._places[rank] for rank in verdict.ranks]

    def complained(self, now: float) -> str:
        """What to warn of without ending anybody, once for each standstill; else empty."""
        with self._lock:
            text = self._judge.complaint(now) if self._judge else ""
            before, self._warned = self._warned, bool(text)
            return "" if before else text

    def _watch(self) -> None:
        while True:
            time.sleep(0.5)
            now = time.monotonic()
            if text := self.complained(now):
                self._warn(f"{text}; no rank is ended")
            judged = self.judged(now)
            if judged is None:
                continue
            verdict, places = judged
            self._warn(f"{verdict.text}; it is ended")
            for place in places:
                _end(place)

    def _warn(self, text: str) -> None:
        log = EventLog(Path(self._events), "watch")
        log.append(NoteEvent(step=self._step, level="warning", text=text))
        log.close()


def _end(place: ProcessPlace) -> None:
    """SIGKILL on the process's own machine. No answer from there: then Ray finds out by itself that it is gone."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    strategy = NodeAffinitySchedulingStrategy(place.node, soft=False)
    remote: Any = ray.remote
    remote(num_cpus=0, max_retries=0, scheduling_strategy=strategy)(_kill).remote(place)


def _kill(place: ProcessPlace) -> None:
    place.process.send(signal.SIGKILL)  # not to another that has got its number


def start_watch(limit: float, events: str, step: str) -> Any:
    """The RankWatch as a Ray actor that takes no CPU of the cluster's count."""
    import ray

    remote: Any = ray.remote
    return remote(num_cpus=0, max_restarts=-1, max_concurrency=4)(RankWatch).remote(limit, events, step)


class Pulse:
    """A rank's side: tells the watch how far `look` says this process is. A context: it ends with the block."""

    def __init__(self, watch: Any, team: str, world: int, rank: int, limit: float, look: Callable[[], Beat]) -> None:
        import ray

        me = Process.of(os.getpid())
        assert me is not None
        place = ProcessPlace(ray.get_runtime_context().get_node_id(), me)
        member = Member(team, world, rank, place)
        self._tell: Callable[[Beat], Any] = lambda beat: watch.beat.remote(member, beat)
        self._done: Callable[[], Any] = lambda: watch.leave.remote(team)
        self._look, self._pause = look, max(0.1, limit / 10)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def __enter__(self) -> Pulse:
        self._tell(self._look())
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """A rank that is done or has failed: whoever started the ranks hears of it in another way."""
        self._over.set()
        self._thread.join()
        self._done()

    def _run(self) -> None:
        while not self._over.wait(self._pause):
            self._tell(self._look())
