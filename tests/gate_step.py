"""A step that works until the test lets it end: `gate` waits for a file. Installed as a stranger's package would be.

Copied into a folder of its own beside a `.dist-info`, which goes on the control plane's path.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import ClassVar

from moray.platform.core.atomic import write_text
from moray.platform.core.errors import StepFailed
from moray.platform.plan.config import StepConfig
from moray.platform.plan.context import StepContext
from moray.platform.plan.step import Step


class GateConfig(StepConfig):
    """folder: `KEY.pid` appears there when the step has begun; it ends when `KEY.open` is there, or `open`."""

    folder: str
    key: str
    ray: bool = False
    fail: int = 0  # how many times it fails before it succeeds


class Gate(Step[GateConfig]):
    name: ClassVar[str] = "gate"
    Config = GateConfig
    produces: ClassVar[str] = "nothing"

    def run(self, ctx: StepContext[GateConfig]) -> None:
        folder = Path(ctx.config.folder)
        if ctx.config.ray:
            ctx.cluster.ensure()
            import ray

            assert ray.get(ray.remote(lambda: 7).remote()) == 7
        write_text(folder / f"{ctx.config.key}.pid", str(os.getpid()))
        with (folder / f"{ctx.config.key}.begun").open("a") as file:
            file.write(f"{ctx.run.name}\n")
        waited = 0
        while not ((folder / f"{ctx.config.key}.open").exists() or (folder / "open").exists()):
            time.sleep(0.05)  # the step's work; it is killed in the midst of it
            waited += 1
            ctx.progress("waiting", min(waited, 9999), 10_000, "rounds")
        if len((folder / f"{ctx.config.key}.begun").read_text().split()) <= ctx.config.fail:
            raise StepFailed("the gate fails as it was asked to", "ask it for less")
        write_text(ctx.folder / "gate.txt", ctx.config.key)
        ctx.outcome = "the gate is open"


step = Gate()
ENTRY_POINTS = "[moray.steps]\ngate = moray_gate:step\n"
METADATA = "Metadata-Version: 2.1\nName: moray-gate\nVersion: 1.0\n"


def install(folder: Path) -> None:
    """Makes `folder` what pip would have made of a package with this step."""
    (folder / "moray_gate-1.0.dist-info").mkdir(parents=True)
    (folder / "moray_gate-1.0.dist-info" / "entry_points.txt").write_text(ENTRY_POINTS)
    (folder / "moray_gate-1.0.dist-info" / "METADATA").write_text(METADATA)
    (folder / "moray_gate.py").write_text(Path(__file__).read_text())
