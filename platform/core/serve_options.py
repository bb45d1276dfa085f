"""How a model is served: device, data type, memory and replicas. The same for `moray serve` and `smoke-serve`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moray.platform.core.errors import InputError

_STEP_TOKENS = 512
_PROMPT_TOKENS = 256  # of a step, at least, beside one token of each running sequence


@dataclass(frozen=True)
class ServeOptions:
    """Options of a replica, and the number of replicas.

    device: `auto` is a GPU if the replica has one. dtype: of the weights and of the cache; `auto` is bfloat16 on a GPU
    and float32 on a CPU. FP8 weights stay FP8. cache_bytes: memory of the latent cache; 0 takes what is needed, up to
    half of what is free. max_running: sequences that decode at the same time. threads: of torch. cpus: that a replica
    reserves; by default half a CPU, or one for each of several threads. Raises InputError.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    cache_bytes: int = 0
    max_running: int = 64
    threads: int = 1
    replicas: int = 1
    cpus: float = 0.0

    def __post_init__(self) -> None:
        for name in ("max_running", "threads", "replicas"):
            if getattr(self, name) < 1:
                flag = f"--{name.replace('_', '-')}"
                raise InputError(f"{flag} is {getattr(self, name)}", f"use {flag} 1 or more")

    @property
    def reserved_cpus(self) -> float:
        return self.cpus or (0.5 if self.threads == 1 else float(self.threads))

    @property
    def step_tokens(self) -> int:
        """The most ids of a step: one of each running sequence, and those of prompts."""
        return max(_STEP_TOKENS, self.max_running + _PROMPT_TOKENS)
