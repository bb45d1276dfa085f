"""`python -m moray.cluster.drills RECIPE [--fault STEP=KIND] ...`: a recipe on a cluster of separate hosts, as root.

Kinds of faults: `node` (of the driver or of tasks, drawn by --seed), `head`, `store`. Prints what happens as it
happens, with the seconds since the start, and last whether every artifact is complete.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import moray
from moray.cluster.drills.hosts import reason_against
from moray.cluster.drills.ray_cluster import WORK, RayDrill, ray_drill
from moray.cluster.drills.scenarios import (
    Fault,
    Say,
    drawn_faults,
    lose_head,
    lose_store,
    run_recipe,
    stored_manifests,
    unnamed_files,
)

_BEGAN = time.monotonic()


def main() -> int:
    """Runs one drill; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m moray.cluster.drills", description=__doc__)
    parser.add_argument("recipe", help="file of a recipe; its folder is copied to the laptop")
    parser.add_argument("--fault", action="append", default=[], metavar="STEP=KIND")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--rate", default="", help="of each link, as tc writes it: 1gbit")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if reason := reason_against():
        print(f"error: no drill on this machine: {reason}", file=sys.stderr)
        return 2
    recipe = Path(given.recipe).resolve()
    folder = Path(tempfile.mkdtemp(prefix="moray-drill-"))
    try:
        with ray_drill(folder, given.nodes, Path(moray.__path__[0]), given.rate) as drill:
            _say(f"{given.nodes} nodes, a head, a store and a laptop are up")
            shutil.copytree(recipe.parent, drill.work, dirs_exist_ok=True)
            code = run_recipe(drill, f"{WORK}/{recipe.name}", _faults(given.fault, given.seed), _say)
            for step, manifest in stored_manifests(drill).items():
                _say(f"{step}/{manifest.fingerprint[:8]}: {len(manifest.files)} files, {manifest.bytes:,} bytes")
            found = unnamed_files(drill)
            _say("no other files" if not found else f"files that no manifest names: {found}")
            return code
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _faults(given: list[str], seed: int) -> list[Fault]:
    kinds: dict[str, Callable[[RayDrill, Say], None]] = {"head": lose_head, "store": partial(lose_store, seconds=60.0)}
    found: list[Fault] = []
    for text in given:
        step, _, kind = text.partition("=")
        found += drawn_faults([step], seed) if kind == "node" else [Fault(step, 1.0, kinds[kind])]
    return found


def _say(text: str) -> None:
    print(f"{time.monotonic() - _BEGAN:7.1f} {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
