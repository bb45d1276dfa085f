"""The EvalReport contract: the evaluation results that `evaluate` writes."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from moray.platform.core.atomic import write_text

REPORT = "report.json"


class EvalRow(BaseModel):
    """One result. labels: distinguish rows of one metric. interval: 95 % confidence interval of `value`; None if
    unknown."""

    model_config = ConfigDict(frozen=True)

    metric: str
    labels: dict[str, str]
    value: float
    n: int  # documents or items
    interval: tuple[float, float] | None
    data: str  # fingerprint of the data it was measured on


class EvalReport(BaseModel):
    """All results of one evaluation of one model."""

    model_config = ConfigDict(frozen=True)

    schema_version: int = 1
    model: str  # reference of the evaluated artifact
    rows: tuple[EvalRow, ...]

    def value(self, metric: str, **labels: str) -> float:
        """The value of the row with this metric and these labels. Raises KeyError unless there is exactly one."""
        found = [row for row in self.rows if row.metric == metric and row.labels == labels]
        if len(found) != 1:
            raise KeyError(f"{len(found)} rows for {metric} {labels}")
        return found[0].value

    def write(self, folder: Path) -> None:
        write_text(folder / REPORT, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> EvalReport:
        return cls.model_validate_json((folder / REPORT).read_bytes())
