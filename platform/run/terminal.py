"""Progress output of a run: one line per step, the current one with rate and ETA, then the closing table.

A listener of events. On a terminal it redraws a live line. Elsewhere (a log file, CI) it prints a line when a step
changes state and at least every ten seconds. All output goes to stderr; stdout carries only results.
"""

from __future__ import annotations

import threading
import time
from collections import deque

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from moray.platform.core.events import Event, MetricEvent, NoteEvent, ProgressEvent, RunEvent, StepEvent
from moray.platform.run.step_run import RunResult
from moray.platform.store.manifest import Manifest

_PLAIN_SECONDS = 10.0


class Terminal:
    """Shows a run's events on `console`. Use as a context manager around the run."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._step = ""
        self._began = 0.0
        self._phase = ""
        self._progress: ProgressEvent | None = None
        self._rate = Rate()
        self._metrics: dict[str, float] = {}
        self._printed = 0.0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name="terminal", daemon=True)

    def __enter__(self) -> Terminal:
        if self._live:
            self._live.start()
        self._ticker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._ticker.join()
        if self._live:
            self._live.stop()

    def __call__(self, event: Event) -> None:
        with self._lock:
            match event:
                case RunEvent(state="started"):
                    self._print(Text.assemble(("run ", "bold"), event.detail))
                case StepEvent():
                    self._step_changed(event)
                case ProgressEvent() if event.step == self._step:
                    if event.phase != self._phase:
                        self._phase, self._rate = event.phase, Rate()
                    self._rate.add(event.time, event.done)
                    self._progress = event
                case MetricEvent():
                    self._metrics[event.name] = event.value
                case NoteEvent():
                    style = "yellow" if event.level == "warning" else "dim"
                    self._print(Text(f"  {event.text}", style=style))
                case _:
                    pass

    def _step_changed(self, event: StepEvent) -> None:
        match event.state:
            case "started" | "waiting":
                self._step, self._began = event.step, time.monotonic()
                self._progress, self._phase, self._metrics = None, "", {}
                self._printed = time.monotonic()
                self._print(Text.assemble(("> ", "cyan"), (f"{event.step:<12}", "bold"), (f" {event.why}", "dim")))
            case "reused":
                self._print(_done_line("=", "blue", event, "reused"))
            case "succeeded":
                self._step = ""
                self._print(_done_line("+", "green", event, seconds(event.seconds)))
            case "failed" | "cancelled":
                self._step = ""
                how = "failed" if event.state == "failed" else "stopped"
                self._print(_done_line("x", "red", event, f"{how} after {seconds(event.seconds)}"))

    def _print(self, text: Text) -> None:
        self.console.print(text, soft_wrap=True)

    def _tick(self) -> None:
        while not self._stop.wait(0.2):
            with self._lock:
                if self._live:
                    self._live.update(self._status(), refresh=True)
                elif self._step and time.monotonic() - self._printed > _PLAIN_SECONDS:
                    self._printed = time.monotonic()
                    self.console.print(self._status(), soft_wrap=True)

    def _status(self) -> RenderableType:
        if not self._step:
            return Text("")
        elapsed = seconds(time.monotonic() - self._began)
        event = self._progress
        if event is None:
            return Text(f"  {self._step}  {elapsed}", style="cyan")
        share = event.done / event.total if event.total else 0.0
        width = 24
        filled = round(share * width)
        line = Text.assemble(
            f"  {event.phase:<12} ",
            ("━" * filled, "cyan"),
            ("─" * (width - filled), "dim"),
            f" {share:4.0%} {count(event.done)}/{count(event.total)} {event.unit}",
        )
        rate = self._rate.per_second()
        if rate:
            line.append(f"  {count(rate)}/s  ETA {seconds((event.total - event.done) / rate)}", style="dim")
        details = [event.detail] if event.detail else []
        if "train_loss" in self._metrics:
            details = [_training_line(self._metrics)]
        return Group(line, *(Text(f"    {text}", style="dim") for text in details)) if details else line


class Rate:
    """Average rate in units per second over the last twenty seconds of reports."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, float]] = deque()

    def add(self, at: float, done: float) -> None:
        self._points.append((at, done))
        while len(self._points) > 2 and at - self._points[0][0] > 20.0:
            self._points.popleft()

    def per_second(self) -> float:
        if len(self._points) < 2:
            return 0.0
        (t0, d0), (t1, d1) = self._points[0], self._points[-1]
        return (d1 - d0) / (t1 - t0) if t1 > t0 else 0.0


def closing_table(result: RunResult) -> Table:
    """Builds the table of steps: time, in, out, reused, outcome."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("step")
    table.add_column("time", justify="right")
    table.add_column("in", justify="right")
    table.add_column("out", justify="right")
    table.add_column("reused")
    table.add_column("outcome", overflow="fold")
    for row in result.steps.values():
        manifest = row.artifact.manifest
        table.add_row(
            row.key,
            "-" if row.reused else seconds(row.seconds),
            quantity(manifest, "in"),
            quantity(manifest, "out"),
            "yes" if row.reused else "",
            manifest.outcome,
        )
    return table


def quantity(manifest: Manifest, side: str) -> str:
    """Formats the count a step reports as its `in` or `out`, with its unit: `in:documents`, `out:tokens`."""
    for name, value in manifest.counts.items():
        if name.startswith(f"{side}:"):
            return f"{count(value)} {name.partition(':')[2]}"
    return ""


def _done_line(mark: str, style: str, event: StepEvent, how: str) -> Text:
    return Text.assemble(
        (f"{mark} ", style), (f"{event.step:<12}", "bold"), f" {how:>10}", ("  " + event.outcome, "default")
    )


def _training_line(metrics: dict[str, float]) -> str:
    parts = [f"loss {metrics['train_loss']:.3f}"]
    shown = (
        ("train_tokens_per_second", "{:,.0f} tokens/s"), ("train_learning_rate", "lr {:.1e}"),
        ("train_grad_norm", "grad norm {:.2f}"), ("train_max_violation", "MaxVio {:.2f}"),
        ("train_mfu", "MFU {:.0%}"), ("train_exposed_communication", "comm {:.0%}"),
        ("train_data_wait", "data wait {:.0%}"),
    )  # fmt: skip
    parts += [template.format(metrics[name]) for name, template in shown if name in metrics]
    return "  ".join(parts)


def seconds(value: float) -> str:
    """Formats a duration: 0.4 s, 12 s, 3 m 05 s, 2 h 10 m."""
    if value < 10:
        return f"{value:.1f} s"
    if value < 60:
        return f"{value:.0f} s"
    if value < 3600:
        return f"{value // 60:.0f} m {value % 60:02.0f} s"
    return f"{value // 3600:.0f} h {value % 3600 // 60:02.0f} m"


def count(value: float) -> str:
    """Formats a count with thousands separators, or with a magnitude suffix from ten million on."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e7, "M")):
        if value >= limit:
            return f"{value / (1e6 if unit == 'M' else limit):.1f}{unit}"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"
