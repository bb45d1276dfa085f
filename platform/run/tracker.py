"""Sends the metrics of a run to the programs that its recipe names in `tracking:`."""

from __future__ import annotations

import time
from collections.abc import Callable

from moray.platform.core.events import Event, MetricEvent, StepEvent
from moray.platform.core.home import Home
from moray.platform.plan.config import user_path
from moray.platform.plan.recipe import Recipe
from moray.platform.run.metric_sink import MetricSink, SinkThread, TrackedStep
from moray.platform.run.tensorboard_sink import TensorBoardSink
from moray.platform.run.wandb_sink import WandbSink

_CLOSE_SECONDS = 60.0  # that a run waits, after its last step, for a sink that is behind
_QUIET_SECONDS = 2.0
Note = Callable[[str, str], None]  # level, text


def open_sinks(recipe: Recipe, home: Home) -> list[MetricSink]:
    """The sinks of a recipe. Raises InputError if one cannot be used, before anything starts."""
    sinks: list[MetricSink] = []
    if recipe.tracking.tensorboard is not None:
        sinks.append(TensorBoardSink(user_path(recipe.tracking.tensorboard).absolute()))
    if (wandb := recipe.tracking.wandb) is not None:
        folder = home.root / "tracking" if wandb.folder is None else user_path(wandb.folder).absolute()
        sinks.append(WandbSink(wandb, folder))
    return sinks


class Tracker:
    """A listener of a run's events. Passes metrics on to the sinks, and never waits for them."""

    def __init__(self, recipe: Recipe, sinks: list[MetricSink], note: Note) -> None:
        self._recipe, self._note = recipe, note
        self._configs = {step.key: step.config for step in recipe.steps}
        self._steps: dict[str, TrackedStep] = {}
        self._threads = [SinkThread(sink, lambda text: note("warning", text)) for sink in sinks]

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepEvent) and event.state == "started" and event.step in self._configs:
            config = self._configs[event.step].model_dump(mode="json", fallback=str)
            self._steps[event.step] = TrackedStep(self._recipe.name, event.step, event.fingerprint, config)
        elif isinstance(event, MetricEvent) and event.step in self._steps:
            for thread in self._threads:
                thread.put(self._steps[event.step], event)

    def close(self) -> None:
        """Lets the sinks write the rest. Gives up after a minute, or at Ctrl-C."""
        end = time.monotonic() + _CLOSE_SECONDS
        for thread in self._threads:
            try:
                done = thread.close(_QUIET_SECONDS)
                if not done:
                    self._note("info", f"waiting for {thread.title}, at most {_CLOSE_SECONDS:.0f} s")
                    done = thread.close(max(0.0, end - time.monotonic()))
            except KeyboardInterrupt:
                done = False
            if not done:
                thread.abandon()
                self._note("warning", f"{thread.title} did not finish; the end of its curves may be missing")
