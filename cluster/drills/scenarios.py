"""Drills: a recipe on a cluster of separate hosts, while something fails. Each prints what happens as it happens."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from moray.cluster.drills.ray_cluster import KEYS, RayDrill
from moray.platform.control.jobs import ENDED
from moray.platform.store.manifest import Manifest
from moray.platform.store.paths import StorePath, bucket_at, set_store_variables
from moray.platform.store.remote import RemoteArtifacts, SharedManifest

_STARTED = re.compile(r"^> (\S+)")
_OFF_SECONDS = 120.0  # the longest that the laptop's commands may fail
_LATEST = 2.0  # seconds after the begin of a step at which a fault may happen

Say = Callable[[str], None]
Happening = Callable[[RayDrill, Say], None]


@dataclass(frozen=True)
class Fault:
    """Something that fails `delay` seconds after a step has begun."""

    step: str
    delay: float
    act: Happening


def lose_node(drill: RayDrill, say: Say, of_driver: bool, chance: random.Random) -> None:
    """Cuts the power of a node, of the driver's or of another one, and boots it again."""
    alive = [host for host in drill.nodes if host.is_on]
    preferred = [host for host in alive if drill.runs_driver(host) == of_driver]
    victim = chance.choice(preferred or alive)
    role = "runs the driver" if drill.runs_driver(victim) else "runs tasks"
    say(f"host {victim.number} loses its power ({role})")
    drill.network.cut_power(victim)
    drill.reboot(victim)
    say(f"host {victim.number} is back")


def lose_head(drill: RayDrill, say: Say) -> None:
    """Cuts the power of Ray's head, and boots it again at the same address with its disk."""
    say(f"host {drill.head.number}, Ray's head, loses its power")
    drill.network.cut_power(drill.head)
    drill.network.power_on(drill.head)
    drill.start_head()
    say("Ray's head is back")


def lose_head_and_state(drill: RayDrill, say: Say) -> None:
    """Cuts the power of Ray's head, and makes a new head at its address. The nodes are started again, because a new
    head does not know them."""
    say(f"host {drill.head.number}, Ray's head, loses its power and its disk")
    for host in [drill.head, *drill.nodes]:
        drill.network.cut_power(host)
    drill.forget_state()
    for host in [drill.head, *drill.nodes]:
        drill.network.power_on(host)
    drill.start_head()
    drill.start_nodes(drill.nodes)
    say("Ray has a new head")


def lose_laptop(drill: RayDrill, say: Say) -> None:
    """Cuts the power of the laptop, and with it the control plane; boots it and starts the control plane again."""
    say("the laptop loses its power")
    drill.network.cut_power(drill.laptop)
    drill.network.power_on(drill.laptop)
    _called(drill, "up")
    say("the control plane is back")


def lose_controller(drill: RayDrill, say: Say) -> None:
    """Kills the controller of the laptop's control plane, which its supervisor starts again."""
    victims = drill.controllers()
    say(f"the controller is killed (process {', '.join(map(str, victims))})")
    for pid in victims:
        os.kill(pid, signal.SIGKILL)


def lose_store(drill: RayDrill, say: Say, seconds: float = 10.0) -> None:
    """Takes the store away, and gives it back: its process is stopped, not killed, as a store keeps its data."""
    say(f"the store is away for {seconds:.0f} s")
    pids = drill.store.pids()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    say("the store is back")


def drawn_faults(steps: Sequence[str], seed: int) -> Iterator[Fault]:
    """One fault in each of these steps, drawn by the seed."""
    chance = random.Random(seed)
    for step in steps:
        act = partial(lose_node, of_driver=chance.random() < 0.5, chance=random.Random(chance.random()))
        yield Fault(step, chance.random() * _LATEST, act)


def run_recipe(drill: RayDrill, recipe: str, faults: Sequence[Fault] = (), say: Say = print) -> int:
    """Runs a recipe from the laptop, with faults. Shows its log. Returns the exit code."""
    command = drill.moray("run", recipe, "--cluster", "drill")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    waiting = _Faults(drill, faults, say)
    assert process.stdout is not None
    for line in process.stdout:
        say(line.rstrip())
        waiting.see(line)
    waiting.join()
    return process.wait()


def submit_recipe(drill: RayDrill, recipe: str, faults: Sequence[Fault] = (), say: Say = print) -> dict[str, Any]:
    """Submits a recipe to the laptop's control plane, with faults. Returns the ended job, with its attempts."""
    _called(drill, "up", "--cpus", "1")
    try:
        job = json.loads(_called(drill, "submit", recipe, "--cluster", "drill", "--json"))["id"]
        waiting, shown = _Faults(drill, faults, say), 0
        while True:
            found = json.loads(_repeated(drill, "status", job, "--json"))
            lines = _repeated(drill, "logs", job).splitlines() if found["attempts"] else []
            shown = min(shown, len(lines))  # the log of a new attempt begins again
            for line in lines[shown:]:
                say(line)
                waiting.see(line)
            shown = len(lines)
            if found["state"] in ENDED:
                waiting.join()
                return dict(found)
            time.sleep(0.5)
    finally:
        _called(drill, "down")


def _called(drill: RayDrill, *arguments: str) -> str:
    """Output of a `moray` command on the laptop. Raises RuntimeError if it fails."""
    done = subprocess.run(drill.moray(*arguments), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"moray {' '.join(arguments)}: exit code {done.returncode}: {done.stderr[-3000:]}")
    return done.stdout


def _repeated(drill: RayDrill, *arguments: str) -> str:
    """Output of a `moray` command on the laptop, which is repeated while the control plane does not respond."""
    deadline = time.monotonic() + _OFF_SECONDS
    while True:
        try:
            return _called(drill, *arguments)
        except RuntimeError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


class _Faults:
    """Faults that wait for the log to say that their steps have begun."""

    def __init__(self, drill: RayDrill, faults: Sequence[Fault], say: Say) -> None:
        self._drill, self._waiting, self._say = drill, list(faults), say
        self._threads: list[threading.Thread] = []

    def see(self, line: str) -> None:
        """Lets the faults happen that a line of the log starts."""
        found = _STARTED.match(line)
        for fault in [one for one in self._waiting if found and one.step == found.group(1)]:
            self._waiting.remove(fault)
            self._threads.append(threading.Thread(target=self._happen, args=[fault], daemon=True))
            self._threads[-1].start()

    def join(self) -> None:
        """Waits until every fault that began has ended."""
        for thread in self._threads:
            thread.join()

    def _happen(self, fault: Fault) -> None:
        time.sleep(fault.delay)
        fault.act(self._drill, self._say)


def stored_manifests(drill: RayDrill) -> dict[str, SharedManifest]:
    """The newest manifest of each step in the store."""
    store = _artifacts(drill)
    found: dict[str, SharedManifest] = {}
    for step in store.steps():
        for manifest in store.of_step(step):
            if step not in found or manifest.started > found[step].started:
                found[step] = manifest
    bucket_at.cache_clear()
    return found


def differing_files(one: Manifest, other: Manifest) -> list[str]:
    """Paths of the files that are not the same in two artifacts."""
    files, others = ({entry.path: entry.sha256 for entry in manifest.files} for manifest in (one, other))
    return sorted(path for path in files.keys() | others.keys() if files.get(path) != others.get(path))


def unnamed_files(drill: RayDrill) -> list[str]:
    """Keys of the store's artifacts that no manifest names, in folders that a manifest names and in others."""
    store = _artifacts(drill)
    found = [item.key for items in store.leftovers(time.time() + 60).values() for item in items]
    for step in store.steps():
        for manifest in store.of_step(step):
            place = StorePath(drill.root, f"{step}/{manifest.fingerprint}/{manifest.objects}")
            named = {f"{place.key}/{entry.path}" for entry in manifest.files}
            found += [item.key for item in place.bucket.objects(f"{place.key}/") if item.key not in named]
    return found


def stored_keys(drill: RayDrill) -> list[str]:
    """Everything in the store."""
    set_store_variables(drill.root, {**KEYS, "AWS_ENDPOINT_URL": drill.endpoint})
    return [item.key for item in bucket_at(drill.root).objects()]


def _artifacts(drill: RayDrill) -> RemoteArtifacts:
    set_store_variables(drill.root, {**KEYS, "AWS_ENDPOINT_URL": drill.endpoint})
    return RemoteArtifacts(drill.root)
