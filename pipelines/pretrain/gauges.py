"""Training metrics as Ray gauges. Ray's agents export them to Prometheus as `ray_moray_NAME`."""

from __future__ import annotations

import sys
from typing import Any

from moray.platform.core.events import MetricEvent
from moray.platform.core.metrics import metric


class Gauges:
    """One gauge per metric, with the metric's labels and the step as labels, and its unit in the HELP text."""

    def __init__(self) -> None:
        self._gauges: dict[str, Any] = {}

    def show(self, event: MetricEvent) -> None:
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():  # a rank that Ray did not start
            return
        from ray.util.metrics import Gauge

        if event.name not in self._gauges:
            row = metric(event.name)
            self._gauges[event.name] = Gauge(f"moray_{row.name}", row.prometheus_help, ("step", *row.labels))
        self._gauges[event.name].set(event.value, {"step": event.step, **event.labels})
