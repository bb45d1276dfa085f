"""What a recipe says to `synthesize`: generators, the teacher, its budget, the sandbox."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from moray.actors.sandbox.limits import SandboxLimits
from moray.platform.core.references import Secret
from moray.platform.plan.config import StepConfig, operational


class _Generator(StepConfig):
    """What all generators have: a name, which is the `source` of their documents, and how many items they make."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    items: int = Field(100, gt=0)
    license: str = "generated"

    @property
    def asks_teacher(self) -> bool:
        return True

    @property
    def runs_code(self) -> bool:
        """Whether it needs the sandbox: for programs, and for what a teacher wrote when it is read as mathematics."""
        return True

    @property
    def reads_documents(self) -> bool:
        """Whether it needs the input `documents`."""
        return False


class Gym(_Generator):
    """Procedural tasks of reasoning-gym, solved by the task itself or by the teacher, and scored by the task."""

    kind: Literal["gym"] = "gym"
    tasks: tuple[str, ...] = Field(
        (), description="names, or categories such as arithmetic; none: all that can be used"
    )
    levels: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="of each task's curriculum, easy ones first")
    solver: Literal["task", "teacher"] = "task"

    @property
    def asks_teacher(self) -> bool:
        return self.solver == "teacher"

    @property
    def runs_code(self) -> bool:
        return self.asks_teacher


class Maths(_Generator):
    """Problems that the teacher writes and solves; it stays what independent solutions agree on."""

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
    votes: int = Field(3, ge=1, description="independent solutions beside the one that comes with the problem")
    agree: float = Field(0.6, gt=0, le=1, description="share of all solutions that must have the same answer")


class Code(_Generator):
    """Functions with tests that the teacher writes; what passes in the sandbox stays."""

    kind: Literal["code"] = "code"
    topics: tuple[str, ...] = Field(
        ("strings", "lists", "dictionaries", "sorting", "recursion", "dates", "matrices", "parsing", "number theory"),
        min_length=1,
    )


class Programs(_Generator):
    """reasoning-gym's collected programs, each with examples of what it returns, made and checked in the sandbox."""

    kind: Literal["programs"] = "programs"
    examples: int = Field(3, ge=1, description="of each program; they become its tests")

    @property
    def asks_teacher(self) -> bool:
        return False


class Rephrase(_Generator):
    """The input `documents` told again: `items` of them, drawn by their ids."""

    kind: Literal["rephrase"] = "rephrase"
    styles: tuple[Literal["faq", "table", "tutorial", "maths"], ...] = Field(("faq",), min_length=1)
    max_characters: int = Field(4000, gt=0, description="of a document that are shown to the teacher")
    min_characters: int = Field(80, gt=0, description="shorter answers are rejected")

    @property
    def runs_code(self) -> bool:
        return False

    @property
    def reads_documents(self) -> bool:
        return True


_KINDS = ("gym", "programs", "maths", "code", "rephrase")


def _kind(written: Any) -> Any:
    kind = written.get("kind") if isinstance(written, dict) else getattr(written, "kind", None)
    if kind in _KINDS:
        return kind
    raise PydanticCustomError(
        "generator",
        "{message}",
        {
            "message": f"a generator of no known kind (got {written!r:.80})",
            "hint": f"give `kind`: {', '.join(_KINDS)}",
        },
    )


# By a function: pydantic takes no field for it that has a validator around it, as all fields of a step have.
Generator = Annotated[
    Annotated[Gym, Tag("gym")]
    | Annotated[Programs, Tag("programs")]
    | Annotated[Maths, Tag("maths")]
    | Annotated[Code, Tag("code")]
    | Annotated[Rephrase, Tag("rephrase")],
    Discriminator(_kind),
]


class Budget(StepConfig):
    """What all requests together may cost. What could exceed it is not sent."""

    dollars: float | None = Field(None, gt=0)
    tokens: int | None = Field(None, gt=0, description="of prompts and answers")
    dollars_per_million_prompt_tokens: float = Field(0.0, ge=0)
    dollars_per_million_answer_tokens: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _priced(self) -> Budget:
        prices = self.dollars_per_million_prompt_tokens + self.dollars_per_million_answer_tokens
        if self.dollars is not None and not prices:
            raise ValueError("a budget in dollars needs dollars_per_million_prompt_tokens and ..._answer_tokens")
        return self


class Teacher(StepConfig):
    """An OpenAI-compatible endpoint."""

    url: str = operational(..., description="up to and including /v1", pattern=r"^https?://")
    model: str
    api_key: Secret | None = None
    temperature: float = Field(0.8, ge=0)
    top_p: float = Field(0.95, gt=0, le=1)
    max_tokens: int = Field(1024, gt=0, description="of an answer")
    chat: bool = Field(True, description="false: /v1/completions, for models without a chat template")
    concurrency: int = operational(16, gt=0)
    retries: int = operational(4, ge=0, description="of a request that fails by the engine's fault, with back-off")
    timeout: float = operational(120.0, gt=0, description="seconds")


class SandboxConfig(StepConfig):
    """Of one program and its tests."""

    seconds: float = Field(10.0, gt=0)
    cpu_seconds: int = Field(5, gt=0)
    memory_mb: int = Field(512, ge=64)
    processes: int = Field(16, gt=0)

    def limits(self) -> SandboxLimits:
        return SandboxLimits(self.seconds, self.cpu_seconds, self.memory_mb << 20, self.processes)


class SynthesizeConfig(StepConfig):
    generators: tuple[Generator, ...] = Field(min_length=1)
    teacher: Teacher | None = None
    budget: Budget = Budget()
    attempts: int = Field(4, ge=1, description="answers that an item may take until one passes its verifier")
    pick: Literal["first", "best"] = Field(
        "first", description="the first answer that passes, or of all `attempts` the shortest that does"
    )
    unanswered: float = Field(
        0.05, ge=0, le=1, description="share of items that may lack an answer because the engine failed"
    )
    similarity: float = Field(
        0.8, ge=0, le=1, description="to another document at which an item is a copy; 0: only exact"
    )
    sandbox: SandboxConfig = SandboxConfig()
    unsafe_sandbox: bool = Field(False, description="run code with limits only where namespaces are not allowed")
    shard_items: int = Field(32, gt=0)
    seed: int = Field(1, ge=0)

    @model_validator(mode="after")
    def _complete(self) -> SynthesizeConfig:
        names = [generator.name for generator in self.generators]
        if len(set(names)) < len(names):
            raise ValueError("two generators have the same name")
        if self.teacher is None and (asking := [one.name for one in self.generators if one.asks_teacher]):
            raise ValueError(f"{', '.join(asking)}: needs a `teacher`")
        return self
