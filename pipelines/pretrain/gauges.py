"""Figures of training as gauges of Ray, which its agents export to Prometheus as `ray_moray_NAME`."""

from __future__ import annotations

import sys
from typing import Any

from moray.platform.core.events import MetricEvent
from moray.platform.core.metrics import metric


class Gauges:
    """A gauge for every metric that comes by; its labels are the metric's, and the step."""

    def __init__(self) -> None:
        self._gauges: dict[str, Any] = {}

    def show(self, event: MetricEvent) -> None:
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():  # a rank that Ray did not start
            return
        from ray.util.metrics import Gauge

        if event.name not in self._gauges:
            row = metric(event.name)
            self._gauges[event.name] = Gauge(f"moray_{row.name}", row.help, ("step", *row.labels))
        self._gauges[event.name].set(event.value, {"step": event.step, **event.labels})
