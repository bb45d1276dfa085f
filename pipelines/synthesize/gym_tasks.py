"""reasoning-gym's tasks: the usable tasks, their levels, and reproducible items.

An item is a pure function of (task, level, seed), so a document that records these three can be verified anywhere: the
task is regenerated and scores the answer. Tasks that sample from sets, whose order differs between processes, are
excluded. Tasks without an answer of their own are usable only if a teacher solves them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from moray.platform.core.errors import RecipeError, nearest

# The first four give different items in each process (0.1.25; they sample from sets of strings), `composite` only
# combines other tasks, and `codeio` runs third-party programs in this process (generators/programs.py sandboxes them).
EXCLUDED = frozenset(
    {"isomorphic_strings", "polynomial_multiplication", "ransom_note", "word_ladder", "composite", "codeio"}
)
WITHOUT_ANSWER = frozenset({"boxnet", "graph_color", "knight_swap", "propositional_logic", "rubiks_cube", "rush_hour"})
NO_LEVEL = -1  # a task without a curriculum


def need_packages(*names: str) -> None:
    """Raises RecipeError if a package is not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        packages = " ".join(name.replace("_", "-") for name in missing)
        raise RecipeError(f"synthesize needs {packages}, not installed", f"pip install {packages}, or moray[synthesis]")


@functools.cache
def categories() -> dict[str, str]:
    """Usable task -> category."""
    from reasoning_gym.factory import DATASETS

    return {name: made.__module__.split(".")[1] for name, (made, _) in sorted(DATASETS.items()) if name not in EXCLUDED}


def choose_tasks(wanted: Sequence[str], with_answer: bool) -> list[str]:
    """The tasks selected by names and categories, sorted. Raises RecipeError for an unknown name."""
    known = categories()
    usable = [name for name in known if not (with_answer and name in WITHOUT_ANSWER)]
    for name in wanted:
        if name not in usable and name not in known.values():
            raise RecipeError(f"no task or category {name!r}", nearest(name, [*usable, *known.values()]))
    return [name for name in usable if not wanted or name in wanted or known[name] in wanted]


@functools.lru_cache(maxsize=16)
def _dataset(task: str, level: int, seed: int) -> tuple[Any, int]:
    """A dataset of one item, and its actual level: some curricula have fewer levels."""
    import reasoning_gym
    from reasoning_gym.factory import CURRICULA, create_curriculum

    if task in CURRICULA:
        for at in range(level, -1, -1):
            curriculum = create_curriculum(task)
            for name, attribute in curriculum.attributes.items():
                curriculum.set_attr_level(name, min(at, len(attribute.levels) - 1))
            with contextlib.suppress(AssertionError):  # this combination of attribute levels is invalid
                settings = vars(curriculum.generate_configuration({"seed": seed, "size": 1}))
                return reasoning_gym.create_dataset(task, **settings), at
    return reasoning_gym.create_dataset(task, seed=seed, size=1), NO_LEVEL


def draw(task: str, level: int, seed: int) -> tuple[dict[str, Any], int]:
    """(entry with question, answer and metadata; actual level)."""
    dataset, at = _dataset(task, level, seed)
    return dataset[0], at


def scorer(task: str, level: int, seed: int) -> Callable[[str], float]:
    """A function that scores an answer, 0 to 1. The item is generated here, so that later calls only evaluate the
    answer."""
    dataset, _ = _dataset(task, level, seed)
    entry = dataset[0]
    return lambda answer: float(dataset.score_answer(answer, entry))


def score_answer(task: str, level: int, seed: int, answer: str) -> float:
    """The task's score of an answer, 0 to 1. For trusted answers only: time and memory are not limited."""
    return scorer(task, level, seed)(answer)
