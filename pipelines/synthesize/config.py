"""The config of `synthesize`: generators, the teacher, its budget, the sandbox."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from moray.actors.sandbox.limits import SandboxLimits
from moray.platform.core.references import Secret
from moray.platform.plan.config import StepConfig, operational


class _Generator(StepConfig):
    """Common fields of all generators. The name is the `source` of the generator's documents."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    items: int = Field(100, gt=0, description="number of items to generate")
    license: str = Field("generated", description="license of the documents")

    @property
    def needs_teacher(self) -> bool:
        return True

    @property
    def runs_code(self) -> bool:
        """Whether it needs the sandbox: for programs, and for evaluating a teacher's mathematics."""
        return True

    @property
    def reads_documents(self) -> bool:
        """Whether it needs the input `documents`."""
        return False


class Gym(_Generator):
    """Procedural tasks of reasoning-gym, solved by the task itself or by the teacher, and scored by the task."""

    kind: Literal["gym"] = "gym"
    tasks: tuple[str, ...] = Field(
        (), description="names of tasks or categories, such as arithmetic; default: all usable tasks"
    )
    levels: tuple[int, ...] = Field(
        (0, 1, 2), min_length=1, description="levels of each task's curriculum, in the order of the documents"
    )
    solver: Literal["task", "teacher"] = Field("task", description="source of the answers")

    @property
    def needs_teacher(self) -> bool:
        return self.solver == "teacher"

    @property
    def runs_code(self) -> bool:
        return self.needs_teacher


class Maths(_Generator):
    """Problems that the teacher writes and solves, accepted if independent solutions agree on the answer."""

    kind: Literal["maths"] = "maths"
    topics: tuple[str, ...] = Field(
        (
            "fractions",
            "percentages",
            "linear equations",
            "number theory",
            "geometry",
            "counting",
            "probability",
            "rates",
        ),
        min_length=1,
    )
    votes: int = Field(3, ge=1, description="further independent solutions of each problem")
    agree: float = Field(0.6, gt=0, le=1, description="fraction of all solutions that must have the same answer")


class Code(_Generator):
    """Functions with tests, written by the teacher, accepted if the tests pass in the sandbox."""

    kind: Literal["code"] = "code"
    topics: tuple[str, ...] = Field(
        ("strings", "lists", "dictionaries", "sorting", "recursion", "dates", "matrices", "parsing", "number theory"),
        min_length=1,
    )


class Programs(_Generator):
    """reasoning-gym's collected programs, with example inputs and outputs generated and checked in the sandbox."""

    kind: Literal["programs"] = "programs"
    examples: int = Field(3, ge=1, description="examples per program, which become its tests")

    @property
    def needs_teacher(self) -> bool:
        return False


class Rephrase(_Generator):
    """Rephrasings of the input `documents`: `items` of them, sampled by a hash of their ids."""

    kind: Literal["rephrase"] = "rephrase"
    styles: tuple[Literal["faq", "table", "tutorial", "maths"], ...] = Field(("faq",), min_length=1)
    max_characters: int = Field(4000, gt=0, description="leading characters of a document in the prompt")
    min_characters: int = Field(80, gt=0, description="shorter answers are rejected")

    @property
    def runs_code(self) -> bool:
        return False

    @property
    def reads_documents(self) -> bool:
        return True


_KINDS = ("gym", "programs", "maths", "code", "rephrase")


def _kind(value: Any) -> Any:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    if kind in _KINDS:
        return kind
    raise PydanticCustomError(
        "generator",
        "{message}",
        {
            "message": f"unknown kind of generator (got {value!r:.80})",
            "hint": f"set `kind` to one of {', '.join(_KINDS)}",
        },
    )


# The discriminator is a function, because all fields of a step have a validator, which pydantic does not accept for a
# discriminator field.
Generator = Annotated[
    Annotated[Gym, Tag("gym")]
    | Annotated[Programs, Tag("programs")]
    | Annotated[Maths, Tag("maths")]
    | Annotated[Code, Tag("code")]
    | Annotated[Rephrase, Tag("rephrase")],
    Discriminator(_kind),
]


class Budget(StepConfig):
    """Limit on the total cost of all requests. A request that could exceed it is not sent."""

    dollars: float | None = Field(None, gt=0)
    tokens: int | None = Field(None, gt=0, description="total tokens of prompts and answers")
    dollars_per_million_prompt_tokens: float = Field(0.0, ge=0)
    dollars_per_million_answer_tokens: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _priced(self) -> Budget:
        prices = self.dollars_per_million_prompt_tokens + self.dollars_per_million_answer_tokens
        if self.dollars is not None and not prices:
            raise ValueError(
                "budget.dollars needs dollars_per_million_prompt_tokens or dollars_per_million_answer_tokens"
            )
        return self


class Teacher(StepConfig):
    """An OpenAI-compatible endpoint."""

    url: str = operational(..., description="base URL, up to and including /v1", pattern=r"^https?://")
    model: str
    api_key: Secret | None = None
    temperature: float = Field(0.8, ge=0)
    top_p: float = Field(0.95, gt=0, le=1)
    max_tokens: int = Field(1024, gt=0, description="maximum tokens of an answer")
    chat: bool = Field(True, description="false: /v1/completions, for models without a chat template")
    concurrency: int = operational(16, gt=0, description="requests in flight, over all tasks")
    retries: int = operational(4, ge=0, description="retries of a request after an engine failure, with back-off")
    timeout: float = operational(120.0, gt=0, description="seconds per request")


class SandboxConfig(StepConfig):
    """Limits of one program with its tests."""

    seconds: float = Field(10.0, gt=0, description="wall-clock time")
    cpu_seconds: int = Field(5, gt=0, description="CPU time of each process")
    memory_mb: int = Field(512, ge=64, description="memory of all processes")
    processes: int = Field(16, gt=0, description="processes and threads")

    def limits(self) -> SandboxLimits:
        return SandboxLimits(self.seconds, self.cpu_seconds, self.memory_mb << 20, self.processes)


class SynthesizeConfig(StepConfig):
    generators: tuple[Generator, ...] = Field(min_length=1)
    teacher: Teacher | None = None
    budget: Budget = Budget()
    attempts: int = Field(4, ge=1, description="maximum answers per item until one passes its verifier")
    pick: Literal["first", "best"] = Field(
        "first", description="first: the first answer that passes; best: the shortest passing one of all `attempts`"
    )
    unanswered: float = Field(
        0.05, ge=0, le=1, description="fraction of items that may lack an answer because the engine failed"
    )
    similarity: float = Field(
        0.8,
        ge=0,
        le=1,
        description="minimum similarity to a corpus document for an item to be a copy; 0: exact copies only",
    )
    sandbox: SandboxConfig = SandboxConfig()
    unsafe_sandbox: bool = Field(False, description="run code with resource limits only, if namespaces are not allowed")
    shard_items: int = Field(32, gt=0, description="items per task")
    seed: int = Field(1, ge=0, description="seed of all random choices")

    @model_validator(mode="after")
    def _complete(self) -> SynthesizeConfig:
        names = [generator.name for generator in self.generators]
        if len(set(names)) < len(names):
            raise ValueError("generators must have unique names")
        if self.teacher is None and (names := [one.name for one in self.generators if one.needs_teacher]):
            raise ValueError(f"generator {', '.join(names)} needs a `teacher`")
        return self
