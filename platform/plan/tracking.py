"""The `tracking:` block of a recipe: programs of the user that show the curves of a run while it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from moray.platform.core.references import Secret
from moray.platform.plan.config import StepConfig, operational


class WandbTracking(StepConfig):
    """Where Weights & Biases shows the curves. Each step with metrics is a run there."""

    project: str = operational(..., min_length=1, max_length=128, description="the project, which need not exist")
    entity: str | None = operational(None, min_length=1, description="the user or team; by default the key's own")
    tags: tuple[str, ...] = operational((), description="tags of the runs")
    mode: Literal["online", "offline"] = operational(
        "online", description="offline: into files that `wandb sync` uploads later"
    )
    folder: Path | None = operational(None, description="folder of W&B's files; by default MORAY_HOME/tracking")
    api_key: Secret | None = operational(
        None, description="by default WANDB_API_KEY, or the key of `wandb login`, on the host that runs the recipe"
    )


class Tracking(StepConfig):
    """No field changes a result."""

    tensorboard: Path | None = operational(None, description="folder for TensorBoard, on the host that runs the recipe")
    wandb: WandbTracking | None = Field(None, description="curves in Weights & Biases")
