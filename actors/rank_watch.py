"""Detection of hung ranks from the ranks' own reports, and a Ray actor that kills them.

A thread of every rank reports the state of its process about ten times in `limit` seconds: its step, the number of
collectives that it started, and the one it waits in. A stopped process, or one on a lost host, does not report. A
process that is stuck elsewhere does not wait in the collective that the others wait in. The actor kills the hung rank
with SIGKILL, because Ray Train notices dead processes but not stopped ones, and logs the reason.

If all ranks are in the same state, or their collectives are not recorded, the hung rank is unknown. Then the actor
kills no rank and logs a warning, and the process group's own timeout applies.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moray.platform.core.events import NoteEvent
from moray.platform.core.processes import Process
from moray.platform.store.paths import any_path
from moray.platform.store.segments import event_log


@dataclass(frozen=True)
class Waiting:
    """The collective that a rank waits in: operation, group, and number within the group."""

    operation: str
    group: str
    number: int


@dataclass(frozen=True)
class Beat:
    """A report of a rank.

    step: its current step. begun: collectives that it has started. waiting: the one it waits in. busy: a long operation
    without collectives, such as saving a checkpoint.
    """

    step: int
    begun: int
    waiting: Waiting | None = None
    busy: str = ""


@dataclass(frozen=True)
class Hang:
    """Hung ranks, and a description."""

    ranks: tuple[int, ...]
    text: str


class HangDetector:
    """Pure logic that finds hung ranks from beats and their times. limit: seconds without progress that are a hang."""

    def __init__(self, world: int, limit: float) -> None:
        self._world, self._limit = world, limit
        self._beats: dict[int, tuple[float, Beat]] = {}
        self._progress = 0.0

    def record(self, now: float, rank: int, beat: Beat) -> None:
        before = self._beats.get(rank)
        if before is None or before[1] != beat:
            self._progress = now
        self._beats[rank] = (now, beat)

    def hang(self, now: float) -> Hang | None:
        """The hung ranks; None if there are none, if they are unknown, or before every rank has reported."""
        if len(self._beats) < self._world:
            return None
        beats = {rank: beat for rank, (_, beat) in self._beats.items()}
        silent = [rank for rank, (time_of_beat, _) in self._beats.items() if now - time_of_beat > self._limit]
        if silent:
            seconds = max(now - self._beats[rank][0] for rank in silent)
            have = "has" if len(silent) == 1 else "have"
            text = f"{_ranks(silent)} {have} not reported for {seconds:.0f} s; {_others(beats, silent)}"
            return Hang(tuple(silent), text)
        seconds = self._stalled(now)
        stuck = _behind(beats) if seconds else []
        if not stuck:
            return None
        be = "is" if len(stuck) == 1 else "are"
        return Hang(tuple(stuck), f"{_ranks(stuck)} {be} stuck for {seconds:.0f} s; {_others(beats, stuck)}")

    def warning(self, now: float) -> str:
        """A warning if all ranks are stalled and the hung rank is unknown (`hang` is None), else ""."""
        seconds = self._stalled(now)
        if not seconds or self.hang(now) is not None:
            return ""
        beats = {rank: beat for rank, (_, beat) in self._beats.items()}
        return (
            f"training has made no progress for {seconds:.0f} s, and the hung rank cannot be determined; "
            f"{_others(beats, [])}"
        )

    def _stalled(self, now: float) -> float:
        """Seconds without progress of any rank, if they exceed the limit and no rank is busy; else 0."""
        busy = any(beat.busy for _, beat in self._beats.values())
        seconds = now - self._progress
        return seconds if len(self._beats) == self._world and not busy and seconds > self._limit else 0.0


def _behind(beats: Mapping[int, Beat]) -> list[int]:
    """The ranks that the others wait for; empty if the collectives do not show it. A single rank waits for no other."""
    if len(beats) == 1:
        return list(beats)
    waiting = [rank for rank, beat in beats.items() if beat.waiting]
    if 0 < len(waiting) < len(beats):
        return [rank for rank in beats if rank not in waiting]
    fewest = min(beat.begun for beat in beats.values())
    behind = [rank for rank, beat in beats.items() if beat.begun == fewest]
    # Counts mean something only if ranks wait: a recorder without a backend in use counts the few collectives before
    # training.
    return behind if waiting and len(behind) < len(beats) else []


def _ranks(ranks: list[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, sorted(ranks)))}"


def _others(beats: Mapping[int, Beat], but: list[int]) -> str:
    """Description of the collective and step that most of the other ranks wait in."""
    waiting: dict[Waiting, list[int]] = {}
    for rank, beat in beats.items():
        if rank not in but and beat.waiting:
            waiting.setdefault(beat.waiting, []).append(rank)
    step = max(beat.step for beat in beats.values()) + 1
    if not waiting:
        return f"no {'other ' if but else ''}rank waits in a recorded collective, at step {step}"
    collective, ranks = max(waiting.items(), key=lambda item: len(item[1]))
    return (
        f"{_ranks(ranks)} waiting in {collective.operation} number {collective.number} of group {collective.group}, "
        f"at step {step}"
    )


@dataclass(frozen=True)
class ProcessPlace:
    """Location of a rank's process."""

    node: str
    process: Process


@dataclass(frozen=True)
class Member:
    """A rank of a team. A team is the set of ranks of one start of training."""

    team: str
    world: int
    rank: int
    place: ProcessPlace


class RankWatch:
    """The actor: looks for hung ranks every half second, and kills them. Wrapped by `start_watch`.

    Every beat names its sender, so a restarted actor needs no state.
    """

    def __init__(self, limit: float, events: str, step: str) -> None:
        self._limit, self._events, self._step = limit, events, step
        self._teams: list[str] = []  # the last one is training
        self._detector: HangDetector | None = None
        self._places: dict[int, ProcessPlace] = {}
        self._warned = False  # about the current stall
        self._hangs: Counter[str] = Counter()  # by node
        self._lock, self._writing = threading.Lock(), threading.Lock()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def beat(self, member: Member, beat: Beat) -> None:
        """Records a beat. A new team replaces the previous one, and late beats of earlier teams are ignored."""
        with self._lock:
            if member.team not in self._teams:
                self._teams.append(member.team)
                self._detector, self._places = HangDetector(member.world, self._limit), {}
            if member.team == self._teams[-1] and self._detector is not None:
                self._places[member.rank] = member.place
                self._detector.record(time.monotonic(), member.rank, beat)

    def leave(self, team: str) -> None:
        """Stops watching a team that has finished."""
        with self._lock:
            if team in self._teams[-1:]:
                self._detector = None

    def new_hang(self, now: float) -> tuple[Hang, list[ProcessPlace]] | None:
        """Hung ranks and their processes, if any. Reported once; then the team is no longer watched."""
        with self._lock:
            hang = self._detector.hang(now) if self._detector else None
            if hang is None:
                return None
            self._detector = None
            places = [self._places[rank] for rank in hang.ranks]
            nodes = {place.node for place in places}
            if len(nodes) == 1:  # of several, the network may be the cause
                self._hangs.update(nodes)
            return hang, places

    def blamed(self) -> tuple[list[str], int]:
        """The nodes whose ranks alone hung more than once, and how many teams have started; since this actor did."""
        with self._lock:
            return [node for node, hangs in self._hangs.items() if hangs > 1], len(self._teams)

    def note(self, text: str) -> None:
        """Writes a warning to the run's events."""
        self._warn(text)

    def new_warning(self, now: float) -> str:
        """A warning about a stall whose hung rank is unknown, once per stall; else ""."""
        with self._lock:
            text = self._detector.warning(now) if self._detector else ""
            before, self._warned = self._warned, bool(text)
            return "" if before else text

    def _watch(self) -> None:
        while True:
            time.sleep(0.5)
            now = time.monotonic()
            if text := self.new_warning(now):
                self._warn(f"{text}; no rank is killed")
            found = self.new_hang(now)
            if found is None:
                continue
            hang, places = found
            self._warn(f"{hang.text}; sending SIGKILL")
            for place in places:
                _kill(place)

    def _warn(self, text: str) -> None:
        with self._writing, event_log(any_path(self._events), "watch") as log:
            log.append(NoteEvent(step=self._step, level="warning", text=text))


def _kill(place: ProcessPlace) -> None:
    """Sends SIGKILL on the process's own machine. If that machine is lost, Ray detects it by itself."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    strategy = NodeAffinitySchedulingStrategy(place.node, soft=False)
    remote: Any = ray.remote
    remote(num_cpus=0, max_retries=0, scheduling_strategy=strategy)(_kill_here).remote(place)


def _kill_here(place: ProcessPlace) -> None:
    place.process.send(signal.SIGKILL)  # never to another process with a reused PID


def start_watch(limit: float, events: str, step: str) -> Any:
    """Starts RankWatch as a Ray actor with `num_cpus=0`."""
    import ray

    remote: Any = ray.remote
    return remote(num_cpus=0, max_restarts=-1, max_concurrency=4)(RankWatch).remote(limit, events, step)


class Pulse:
    """A rank's side: a context that reports to the watch, from a thread, the beats that `observe` returns."""

    def __init__(self, watch: Any, team: str, world: int, rank: int, limit: float, observe: Callable[[], Beat]) -> None:
        import ray

        me = Process.of(os.getpid())
        assert me is not None
        place = ProcessPlace(ray.get_runtime_context().get_node_id(), me)
        member = Member(team, world, rank, place)
        self._report: Callable[[Beat], Any] = lambda beat: watch.beat.remote(member, beat)
        self._done: Callable[[], Any] = lambda: watch.leave.remote(team)
        self._observe, self._pause = observe, max(0.1, limit / 10)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def __enter__(self) -> Pulse:
        self._report(self._observe())
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Ends the reports, also if the rank failed, because Ray Train detects that by itself."""
        self._over.set()
        self._thread.join()
        self._done()

    def _run(self) -> None:
        while not self._over.wait(self._pause):
            self._report(self._observe())
