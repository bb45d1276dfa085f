"""What a recipe may say of dedup."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moray.pipelines.text.minhash import Shingling
from moray.platform.plan.config import StepConfig


class DedupConfig(StepConfig):
    shingle: int = Field(5, gt=0, description="consecutive words, or characters, that are compared as one")
    unit: Literal["words", "characters"] = "words"
    bands: int = Field(16, gt=0, description="keys of a document; who shares one with another is looked at")
    rows: int = Field(7, gt=0, description="minima that make a key: more of them, fewer documents that are looked at")
    threshold: float | None = Field(
        None, gt=0, lt=1, description="of bands * rows minima, as many a key as tell best who is as alike as this"
    )
    similarity: float = Field(
        0.7, ge=0, le=1, description="of near duplicates at least; 0: whoever shares a key is one, nothing is verified"
    )
    measure: Literal["jaccard", "containment"] = Field(
        "jaccard", description="shingles in common over those of both, or over those of the shorter"
    )
    prefer: tuple[str, ...] = Field((), description="sources whose documents are kept first, best first")
    seed: int = Field(1, ge=0)
    index: str = Field(
        "", pattern=r"^([a-z0-9][a-z0-9._-]*)?$", description="what runs with this name have seen before counts too"
    )
    index_form: Literal["exact", "bloom"] = Field(
        "exact", description="bloom: half the size, and what it has seen is not verified"
    )

    @property
    def shingling(self) -> Shingling:
        bands, rows = self.bands, self.rows
        if self.threshold is not None:
            bands, rows = Shingling.for_threshold(self.threshold, bands * rows)
        return Shingling(self.shingle, self.unit == "characters", bands, rows, self.seed)
