"""Curves and maps that stay small however long a run is: thinned while they grow, with their extremes kept."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from moray.platform.core.events import MetricEvent

MOST_POINTS = 500
MOST_ROWS = 250
_DIGITS = 6  # significant ones; more cannot be seen


@dataclass
class Curve:
    """(at, value) pairs. A position that was reported twice, after a restart, counts once: as last reported."""

    _found: dict[int, tuple[float, float]] = field(default_factory=dict)  # at -> (value, time)

    def add(self, at: int, value: float, time: float) -> None:
        if at not in self._found or time >= self._found[at][1]:
            self._found[at] = (value, time)
        if len(self._found) > 4 * MOST_POINTS:
            kept = thin([(at, value) for at, (value, _) in sorted(self._found.items())], 2 * MOST_POINTS)
            self._found = {at: self._found[at] for at, _ in kept}

    def points(self) -> list[list[float | None]]:
        """At most 500, ascending, values to six digits."""
        found = thin([(at, value) for at, (value, _) in sorted(self._found.items())], MOST_POINTS)
        return [[at, short(value)] for at, value in found]


def thin(points: list[tuple[int, float]], most: int) -> list[tuple[int, float]]:
    """`points`, or no more than `most` of them: the first, the last, and the lowest and highest of each stretch."""
    if len(points) <= most:
        return points
    inner, stretches = points[1:-1], (most - 2) // 2
    kept = {0: points[0], len(points) - 1: points[-1]}
    for i in range(stretches):
        start, stop = i * len(inner) // stretches, (i + 1) * len(inner) // stretches
        for choose in (min, max):
            place = choose(range(start, stop), key=lambda j: inner[j][1])
            kept[place + 1] = inner[place]
    return [kept[place] for place in sorted(kept)]


@dataclass
class LoadMap:
    """The load of every MoE layer at some training steps; every other step is dropped when there are too many."""

    _rows: dict[int, dict[int, float]] = field(default_factory=dict)  # at -> layer -> load
    last: float = 0.0

    def add(self, event: MetricEvent) -> None:
        layer = event.labels.get("layer", "")
        if not layer.isdigit():
            return
        if len(self._rows) >= 2 * MOST_ROWS and event.at not in self._rows:
            self._rows = {at: row for i, (at, row) in enumerate(sorted(self._rows.items())) if i % 2 == 0}
        self._rows.setdefault(event.at, {})[int(layer)] = event.value
        self.last = max(self.last, event.time)

    def as_json(self) -> dict[str, Any] | None:
        """As docs/http-api.md shows it: a row of `values` for each of `steps`; null where a layer is not known."""
        steps = sorted(self._rows)
        every = -(-len(steps) // MOST_ROWS)
        if not steps:
            return None
        steps = steps[len(steps) - 1 :: -every][::-1]  # the last one always
        layers = sorted({layer for row in self._rows.values() for layer in row})
        values = [[short(self._rows[at].get(layer)) for layer in layers] for at in steps]
        return {"steps": steps, "layers": layers, "values": values, "what": "max/mean load"}


def short(value: float | None) -> float | None:
    """A number that JSON can carry: NaN and infinities become null."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{_DIGITS}g}")
