"""YaRN: a longer context for the rotary part of a trained model (Peng et al., arXiv 2309.00071; DeepSeek-V3 §4.3).

A pair of elements that rotates often within the original context keeps its frequency. A pair that does not complete one
rotation has its frequency divided by `factor`. In between, the frequencies are interpolated linearly over the pair
index. Scores are multiplied by `score_magnitude` squared, which preserves the entropy of attention over more keys. Only
the decoupled rotary part is scaled.

Notable: DeepSeek's `mscale` and `mscale_all_dim` are two halves of the paper's one temperature: their quotient
multiplies the rotary part alone, and the second multiplies all scores. In DeepSeek-V3 both are 1, which is the default
here; in V2-Lite both are 0.707. So the quotient is 1 in every published model. Where it is not, DeepSeek's code,
transformers and llama.cpp read one config as different models. Pure Python, no torch.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Yarn:
    """The fields of a config's `rope_scaling`. A value out of range raises ValueError with field, value and rule."""

    factor: float
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"rope_scaling.{field.name} = {value!r} must be a number of at least 0")
        if self.factor < 1:
            raise ValueError(f"rope_scaling.factor = {self.factor!r} must be at least 1")
        if not isinstance(self.original_max_position_embeddings, int) or self.original_max_position_embeddings < 1:
            shown = self.original_max_position_embeddings
            raise ValueError(f"rope_scaling.original_max_position_embeddings = {shown!r} must be a positive integer")
        scales = (self.mscale, self.mscale_all_dim)
        if not all(scales) and scales != (1, 0):
            raise _ambiguous(*scales)
        if not self.beta_fast >= self.beta_slow > 0:
            raise ValueError(f"rope_scaling.beta_slow = {self.beta_slow!r} must be above 0 and not above beta_fast")

    @classmethod
    def from_hf(cls, rope: Mapping[str, Any]) -> "Yarn":
        """Reads `rope_scaling` or `rope_parameters` of a config.json. Raises ValueError for unsupported values, and if
        DeepSeek's code and transformers read different models."""
        made = cls.from_fields(rope)
        if rope.get("original_max_position_embeddings") is None:
            raise ValueError(
                "rope_scaling lacks original_max_position_embeddings: DeepSeek's code takes 4096 for it, transformers "
                "max_position_embeddings"
            )
        scales = (rope.get("mscale"), rope.get("mscale_all_dim"))
        if scales in ((None, None), (1, None)):  # all implementations use this default
            return dataclasses.replace(made, mscale=1.0, mscale_all_dim=0.0)
        if None in scales:
            raise _ambiguous(*scales)
        return made

    @classmethod
    def from_fields(cls, rope: Mapping[str, Any]) -> "Yarn":
        """Reads named fields, as in a recipe; missing fields have their defaults."""
        for name, only in (("attention_factor", None), ("truncate", True)):
            if rope.get(name, only) != only:
                raise ValueError(f"rope_scaling.{name} = {rope[name]!r} is not supported; leave it out")
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := unknown_fields(rope):
            raise ValueError(f"rope_scaling has unknown fields {unknown}; it may have {', '.join(names)}")
        if "factor" not in rope:
            raise ValueError("rope_scaling lacks factor")
        return cls(**{name: rope[name] for name in names if rope.get(name) is not None})

    def to_hf(self) -> dict[str, Any]:
        return {"type": "yarn", **dataclasses.asdict(self)}

    @property
    def rotary_magnitude(self) -> float:
        """The factor of the rotated elements of queries and keys."""
        return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)

    @property
    def score_magnitude(self) -> float:
        """The square root of the factor of attention scores."""
        return self._magnitude(self.mscale_all_dim)

    def frequency_scales(self, dim: int, theta: float) -> list[float]:
        """For each of the dim / 2 pairs, the factor of its frequency theta^(-2i / dim): 1 ... 1 / factor."""
        first = max(math.floor(self._pair(self.beta_fast, dim, theta)), 0)
        last = min(math.ceil(self._pair(self.beta_slow, dim, theta)), dim - 1)
        width = last - first if last != first else 0.001
        blends = [min(max((pair - first) / width, 0.0), 1.0) for pair in range(dim // 2)]
        return [blend / self.factor + (1.0 - blend) for blend in blends]

    def _pair(self, turns: float, dim: int, theta: float) -> float:
        """The pair index, as a real number, that completes `turns` rotations within the original context."""
        return dim * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    def _magnitude(self, scale: float) -> float:
        return 0.1 * scale * math.log(self.factor) + 1.0


def _ambiguous(mscale: float | None, mscale_all_dim: float | None) -> ValueError:
    return ValueError(
        f"rope_scaling.mscale = {mscale!r} with mscale_all_dim = {mscale_all_dim!r} is read as different models by "
        "DeepSeek's code and transformers; both must be above 0"
    )


def unknown_fields(rope: Mapping[str, Any]) -> list[str]:
    """Unknown names in `rope_scaling` or `rope_parameters`."""
    names = {field.name for field in dataclasses.fields(Yarn)}
    return sorted(set(rope) - names - {"type", "rope_type", "rope_theta", "attention_factor", "truncate"})
