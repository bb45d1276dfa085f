"""Drills: a recipe on a cluster of separate hosts, while something fails. Each prints what happens as it happens."""

from __future__ import annotations

import random
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from moray.cluster.drills.ray_cluster import KEYS, RayDrill
from moray.platform.store.manifest import Manifest
from moray.platform.store.paths import StorePath, bucket_at, set_store_variables
from moray.platform.store.remote import RemoteArtifacts

_STARTED = re.compile(r"^> (\S+)")
_LATEST = 2.0  # seconds after the begin of a step at which a fault may happen

Say = Callable[[str], None]


@dataclass(frozen=True)
class Fault:
    """Something that fails `delay` seconds after a step has begun."""

    step: str
    delay: float
    act: Callable[[RayDrill, Say], None]


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


def lose_store(drill: RayDrill, say: Say, seconds: float = 10.0) -> None:
    """Takes the store away, and gives it back: its process is stopped, not killed, as a store keeps its data."""
    say(f"the store is away for {seconds:.0f} s")
    listed = subprocess.run(["ip", "netns", "pids", drill.store.namespace], check=True, capture_output=True, text=True)
    pids = listed.stdout.split()
    subprocess.run(["kill", "-STOP", *pids], check=False)
    time.sleep(seconds)
    subprocess.run(["kill", "-CONT", *pids], check=False)
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
    waiting, threads = list(faults), []
    assert process.stdout is not None
    for line in process.stdout:
        say(line.rstrip())
        found = _STARTED.match(line)
        for fault in [one for one in waiting if found and one.step == found.group(1)]:
            waiting.remove(fault)
            threads.append(threading.Thread(target=_later, args=[fault, drill, say], daemon=True))
            threads[-1].start()
    for thread in threads:
        thread.join()
    return process.wait()


def _later(fault: Fault, drill: RayDrill, say: Say) -> None:
    time.sleep(fault.delay)
    fault.act(drill, say)


def stored_manifests(drill: RayDrill) -> dict[str, Manifest]:
    """The newest manifest of each step in the store."""
    store = _artifacts(drill)
    found: dict[str, Manifest] = {}
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
    """Keys in the folders of the store's artifacts that no manifest names."""
    store = _artifacts(drill)
    found = []
    for step in store.steps():
        for manifest in store.of_step(step):
            place = StorePath(drill.root, f"{step}/{manifest.fingerprint}/{manifest.objects}")
            named = {f"{place.key}/{entry.path}" for entry in manifest.files}
            found += [item.key for item in place.bucket.objects(f"{place.key}/") if item.key not in named]
    return found


def _artifacts(drill: RayDrill) -> RemoteArtifacts:
    set_store_variables(drill.root, {**KEYS, "AWS_ENDPOINT_URL": drill.endpoint})
    return RemoteArtifacts(drill.root)
