"""Every kind of generator has a class, which queries a teacher exactly if its config declares it."""

from __future__ import annotations

import pytest

from moray.actors.sandbox.limits import SandboxLimits
from moray.pipelines.synthesize.config import Code, Generator, Gym, Maths, Programs, Rephrase
from moray.pipelines.synthesize.generators.generator import GeneratorContext, ItemAnswer, TeacherGenerator
from moray.pipelines.synthesize.generators.open_generator import open_generator
from moray.pipelines.synthesize.items import Item
from moray.pipelines.synthesize.teacher import Answer
from moray.platform.core.errors import RecipeError

CONTEXT = GeneratorContext(SandboxLimits(), unsafe=False)
KINDS: list[Generator] = [
    Gym(name="g"), Gym(name="g", solver="teacher"), Programs(name="p"), Maths(name="m"), Code(name="c"),
    Rephrase(name="r"),
]  # fmt: skip


@pytest.mark.parametrize("config", KINDS, ids=lambda config: f"{config.kind}, teacher: {config.needs_teacher}")
def test_a_config_declares_whether_its_generator_needs_a_teacher(config: Generator) -> None:
    generator = open_generator(config, CONTEXT)
    assert isinstance(generator, TeacherGenerator) == config.needs_teacher
    if config.reads_documents:
        with pytest.raises(RecipeError, match="needs the input"):
            generator.check([])
    generator.check(["documents"])


def test_a_rephrasing_is_rejected_for_its_form() -> None:
    generator = open_generator(Rephrase(name="r", min_characters=10), CONTEXT)
    assert isinstance(generator, TeacherGenerator)

    def query(prompts: object) -> list[Answer]:
        raise AssertionError("a form needs no further answer")

    def detail(style: str, text: str) -> str:
        item = Item("r", 0, 1, meta={"style": style}, facts={"text": "A text that is told again?"})
        (result,) = generator.verify([ItemAnswer(item, text, seed=1, cost=0.0)], query)
        assert result.reason == ("form" if result.detail else "")
        return result.detail

    assert detail("faq", "short") == "5 characters"
    assert detail("faq", "No question here at all.") == "no question"
    assert detail("table", "No table here at all.") == "no table"
    assert detail("table", "| a | b |\n| --- | --- |\n| 1 | 2 |") == ""
    assert detail("tutorial", "that is told again?") == "a copy of the text"
    assert detail("faq", "What is told again? A text.") == ""
