"""How a model is served: device, data type, memory and replicas. The same for `moray serve`, `smoke-serve` and
deployments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Strict

from moray.platform.core.errors import InputError

_STEP_TOKENS = 512
_PROMPT_TOKENS = 256  # of a step, at least, beside one token of each running sequence
MOST_REPLICAS = 1000
Int = Annotated[int, Strict()]  # in JSON: not true, not "1"
_LIMITS = {"max_running": 100_000, "threads": 10_000, "replicas": MOST_REPLICAS, "target_tokens": 10**12}
_LEAST_CPUS, _MOST_CPUS = 0.01, 10_000.0
_MOST_BYTES = 10**18


@dataclass(frozen=True)
class ServeOptions:
    """Options of a replica, and the number of replicas.

    device: `auto` is a GPU if the replica has one. dtype: of the weights and of the cache; `auto` is bfloat16 on a GPU
    and float32 on a CPU. FP8 weights stay FP8 on a GPU. quantize: form of the weights on a CPU, `int8` with a scale per
    output, or "". cache_bytes: memory of the latent cache; 0 takes what is needed, up to
    half of what is free. max_running: sequences that decode at the same time. threads: of torch.

    replicas: at least. most_replicas: with autoscaling; 0 for a fixed number. target_tokens: with autoscaling, the
    tokens that the open requests of a replica still read or write; with more, a replica is added. cpus, gpus,
    memory_bytes: that a replica reserves; by default half a CPU, or one for each of several threads, and one GPU if the
    cluster has any and the device is not `cpu` (`gpus` -1). Raises InputError.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")  # a misspelled name in JSON is an error

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantize: Literal["", "int8"] = ""
    cache_bytes: Int = 0
    max_running: Int = 256
    threads: Int = 1
    replicas: Int = 1
    cpus: Annotated[float, Strict()] = 0.0
    most_replicas: Int = 0
    gpus: Int = -1
    memory_bytes: Int = 0
    target_tokens: Int = 2048

    def __post_init__(self) -> None:
        for name, most in _LIMITS.items():
            flag, value = f"--{name.replace('_', '-')}", getattr(self, name)
            if not 1 <= value <= most:
                raise InputError(f"{flag} is {value}", f"use {flag} 1 to {most}")
        if self.most_replicas and not self.replicas <= self.most_replicas <= MOST_REPLICAS:
            given = f"--replicas {self.replicas}..{self.most_replicas}"
            raise InputError(given, f"MIN..MAX: the second number is at least the first, and at most {MOST_REPLICAS}")
        if self.cpus and not _LEAST_CPUS <= self.cpus <= _MOST_CPUS:
            raise InputError(f"--cpus {self.cpus:g}", f"use {_LEAST_CPUS:g} to {_MOST_CPUS:g}, or leave it out")
        if not 0 <= self.memory_bytes <= _MOST_BYTES or not 0 <= self.cache_bytes <= _MOST_BYTES:
            raise InputError("memory of a replica must be 0 to 1 EB", "leave it out for the default")
        if self.gpus not in (-1, 0, 1):
            raise InputError(f"--gpus {self.gpus}: a replica uses at most one GPU", "use --gpus 0 or 1")

    @property
    def reserved_cpus(self) -> float:
        return self.cpus or (0.5 if self.threads == 1 else float(self.threads))

    @property
    def step_tokens(self) -> int:
        """The most ids of a step: one of each running sequence, and those of prompts."""
        return max(_STEP_TOKENS, self.max_running + _PROMPT_TOKENS)

    def resources(self, cluster_gpus: int) -> dict[str, float]:
        """What a replica reserves, in the words of Ray's actor options. Raises InputError if it asks for a GPU and the
        cluster has none."""
        wants = self.gpus == 1 or self.device == "cuda"
        if wants and not cluster_gpus:
            flag, fix = ("--device cuda", "use --device cpu") if self.device == "cuda" else ("--gpus 1", "leave it out")
            raise InputError(f"{flag}: the cluster has no GPU", fix)
        on_gpu = cluster_gpus > 0 and self.gpus != 0 and self.device != "cpu"
        reserved = {"num_cpus": self.reserved_cpus}
        if on_gpu:
            reserved["num_gpus"] = 1.0
        if self.memory_bytes:
            reserved["memory"] = float(self.memory_bytes)
        return reserved
