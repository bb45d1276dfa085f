"""The configuration of the step `dedup`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moray.pipelines.text.minhash import Shingling
from moray.platform.plan.config import StepConfig


class DedupConfig(StepConfig):
    shingle: int = Field(5, gt=0, description="shingle length, in units of `unit`")
    unit: Literal["words", "characters"] = "words"
    bands: int = Field(16, gt=0, description="MinHash-LSH bands; documents that agree in any band are candidates")
    rows: int = Field(7, gt=0, description="MinHash-LSH rows (hashes) per band; more rows give fewer candidates")
    threshold: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="choose bands and rows, with at most bands * rows hashes, for this similarity threshold",
    )
    similarity: float = Field(
        0.7, ge=0, le=1, description="minimum similarity of near duplicates; 0: accept candidates without verification"
    )
    measure: Literal["jaccard", "containment"] = Field(
        "jaccard", description="shared shingles over the union, or over the smaller document's shingles"
    )
    prefer: tuple[str, ...] = Field((), description="sources whose documents are kept, highest priority first")
    seed: int = Field(1, ge=0)
    index: str = Field(
        "",
        pattern=r"^([a-z0-9][a-z0-9._-]*)?$",
        description="index name: also deduplicate against earlier runs with this name",
    )
    index_form: Literal["exact", "bloom"] = Field(
        "exact", description="bloom: half the size, but matches with earlier runs are not verified"
    )

    @property
    def shingling(self) -> Shingling:
        bands, rows = self.bands, self.rows
        if self.threshold is not None:
            bands, rows = Shingling.for_threshold(self.threshold, bands * rows)
        return Shingling(self.shingle, self.unit == "characters", bands, rows, self.seed)
