"""Metrics for Prometheus: those of one replica, and the board on which all replicas of a cluster put theirs.

A scrape of any proxy has the metrics of all replicas. Requests for `/metrics` that went through Serve would reach one
replica at random.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from moray.pipelines.serve.shared_actor import find_shared_actor, shared_actor
from moray.platform.core.events import ServingEvent

_log = logging.getLogger(__name__)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PUBLISH_SECONDS = 2.0
_OLD_SECONDS = 15.0  # after which a replica no longer counts
_FIRST_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_PER_TOKEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_LABELS = ("model", "replica")


class ReplicaMetrics:
    """Times of one replica's requests, and its counts as metrics."""

    def __init__(self, model: str, replica: str) -> None:
        self._labels = (model, replica)
        self._registry = CollectorRegistry()
        self._first_token = self._histogram(
            "moray_time_to_first_token_seconds", "From a request to its first token", _FIRST_TOKEN
        )
        self._per_token = self._histogram(
            "moray_time_per_output_token_seconds", "Between the tokens of an answer, on average", _PER_TOKEN
        )

    def observe(self, first_token: float | None, per_token: float | None) -> None:
        """Counts a request's times in seconds, those that it had."""
        if first_token is not None:
            self._first_token.labels(*self._labels).observe(first_token)
        if per_token is not None:
            self._per_token.labels(*self._labels).observe(per_token)

    def collect(self, event: ServingEvent) -> list[Metric]:
        """All metrics. event: the replica's counts and state now."""
        outcomes = {"failed": event.failed, "cancelled": event.cancelled, "refused": event.refused}
        outcomes["answered"] = event.requests - event.failed - event.cancelled
        state = {
            "moray_requests_running": ("Answers in the last step", float(event.running)),
            "moray_requests_waiting": ("Answers that wait for their turn", float(event.waiting)),
            "moray_cache_usage_ratio": ("Share of the cache's blocks in use", event.cache),
        }
        counted = {
            "moray_prompt_tokens": ("Tokens of prompts", event.prompt_tokens),
            "moray_cached_prompt_tokens": ("Tokens of prompts that were in the cache", event.cached_tokens),
            "moray_completion_tokens": ("Generated tokens", event.completion_tokens),
        }
        return [
            *self._registry.collect(),
            self._counter("moray_requests", "Requests that have ended", "outcome", outcomes),
            *(self._counter(name, text, "", {"": count}) for name, (text, count) in counted.items()),
            *(self._gauge(name, text, "", {"": value}) for name, (text, value) in state.items()),
            self._gauge(
                "moray_expert_load_ratio",
                "Rows of the most loaded expert over the mean, by MoE layer",
                "layer",
                {str(layer): load for layer, load in enumerate(event.expert_load)},
            ),
            self._counter(
                "moray_key_requests", "Requests of a key", "key", {key: use[0] for key, use in event.keys.items()}
            ),
            self._counter(
                "moray_key_tokens", "Tokens of a key", "key", {key: use[1] + use[2] for key, use in event.keys.items()}
            ),
        ]

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, text, _LABELS, buckets=buckets, registry=self._registry)

    def _counter(self, name: str, text: str, label: str, values: dict[str, int]) -> Metric:
        return self._filled(CounterMetricFamily(name, text, labels=[*_LABELS, *([label] if label else [])]), values)

    def _gauge(self, name: str, text: str, label: str, values: dict[str, float]) -> Metric:
        return self._filled(GaugeMetricFamily(name, text, labels=[*_LABELS, *([label] if label else [])]), values)

    def _filled(self, family: Any, values: dict[str, Any]) -> Metric:
        for value, count in values.items():
            family.add_metric([*self._labels, *([value] if value else [])], count)
        metric: Metric = family
        return metric


class MetricsBoard:
    """An actor with the latest metrics of every replica."""

    def __init__(self) -> None:
        self._latest: dict[str, tuple[float, list[Metric]]] = {}

    def put(self, replica: str, metrics: list[Metric]) -> None:
        self._latest[replica] = (time.monotonic(), metrics)

    def read(self) -> list[Metric]:
        """Those of replicas that have put theirs a moment ago."""
        oldest = time.monotonic() - _OLD_SECONDS
        self._latest = {replica: found for replica, found in self._latest.items() if found[0] >= oldest}
        return [metric for _, metrics in self._latest.values() for metric in metrics]


async def publish_metrics(replica: str, collect: Any) -> None:
    """Puts a replica's metrics on the board until it is cancelled."""
    board: Any = None
    while True:
        try:
            board = board or shared_actor(MetricsBoard)
            await board.put.remote(replica, collect())
        except Exception as error:  # the board has ended with its maker
            _log.info("the metrics are not published: %s", error)
            board = None
        await asyncio.sleep(_PUBLISH_SECONDS)


async def read_board() -> list[Metric]:
    """The metrics of all replicas of this cluster; none before the first replica has put its own."""
    try:
        found: list[Metric] = await find_shared_actor(MetricsBoard).read.remote()
    except Exception:  # there is no board, or it has just ended
        return []
    return found


def as_text(metrics: Iterable[Metric]) -> bytes:
    """Metrics in Prometheus' text format. Those of one name are joined."""
    merged: dict[str, Metric] = {}
    for metric in metrics:
        known = merged.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
        known.samples += metric.samples
    return generate_latest(_Collected(list(merged.values())))


class _Collected:
    """What `generate_latest` asks a registry for."""

    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> list[Metric]:
        return self._metrics
