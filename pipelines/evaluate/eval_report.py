"""The EvalReport contract: what `evaluate` writes, and what gates, cards and people read."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from moray.platform.core.atomic import write_text

REPORT = "report.json"


class EvalRow(BaseModel):
    """One figure. `labels` tells rows of one metric apart; `interval` is the 95 % bootstrap interval of `value`."""

    model_config = ConfigDict(frozen=True)

    metric: str
    labels: dict[str, str]
    value: float
    n: int  # documents
    interval: tuple[float, float]
    data: str  # fingerprint of the data it was measured on


class EvalReport(BaseModel):
    """All figures of one evaluation of one model."""

    model_config = ConfigDict(frozen=True)

    schema_version: int = 1
    model: str  # reference of the evaluated artifact
    rows: tuple[EvalRow, ...]

    def value(self, metric: str, **labels: str) -> float:
        """The one row with this metric and these labels. KeyError if there is none or more than one."""
        found = [row for row in self.rows if row.metric == metric and row.labels == labels]
        if len(found) != 1:
            raise KeyError(f"{len(found)} rows for {metric} {labels}")
        return found[0].value

    def write(self, folder: Path) -> None:
        write_text(folder / REPORT, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> EvalReport:
        return cls.model_validate_json((folder / REPORT).read_bytes())
