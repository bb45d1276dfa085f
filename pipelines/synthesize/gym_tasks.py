"""reasoning-gym's tasks: which of them can be used, at which level, and one item of them again at any time.

An item is a pure function of (task, level, seed), so a document that names these three can be verified by anyone: the
task is drawn anew, and scores the answer. Tasks that draw from sets, whose order another process does not share, are
left out; so are, unless a teacher solves them, those that know no answer of their own.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from moray.platform.core.errors import RecipeError, nearest

# Other items in another process (0.1.25; they draw from sets of strings); no task of its own; one that runs other
# people's programs where it is drawn (generators/programs.py runs them in the sandbox).
LEFT_OUT = frozenset(
    {"isomorphic_strings", "polynomial_multiplication", "ransom_note", "word_ladder", "composite", "codeio"}
)
WITHOUT_ANSWER = frozenset({"boxnet", "graph_color", "knight_swap", "propositional_logic", "rubiks_cube", "rush_hour"})
NO_LEVEL = -1  # a task without a curriculum


def need_packages(*names: str) -> None:
    """Raises RecipeError if one is not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        packages = " ".join(name.replace("_", "-") for name in missing)
        raise RecipeError(f"synthesize needs {packages}, not installed", f"pip install {packages}, or moray[synthesis]")


@functools.cache
def categories() -> dict[str, str]:
    """Usable task -> category."""
    from reasoning_gym.factory import DATASETS

    return {name: made.__module__.split(".")[1] for name, (made, _) in sorted(DATASETS.items()) if name not in LEFT_OUT}


def choose_tasks(wanted: Sequence[str], with_answer: bool) -> list[str]:
    """Names for names and categories, sorted. Raises RecipeError for what is neither."""
    known = categories()
    usable = [name for name in known if not (with_answer and name in WITHOUT_ANSWER)]
    for name in wanted:
        if name not in usable and name not in known.values():
            raise RecipeError(f"no task or category {name!r}", nearest(name, [*usable, *known.values()]))
    return [name for name in usable if not wanted or name in wanted or known[name] in wanted]


@functools.lru_cache(maxsize=16)
def _dataset(task: str, level: int, seed: int) -> tuple[Any, int]:
    """A dataset of one item, and the level that it really has: some curricula do not go that far."""
    import reasoning_gym
    from reasoning_gym.factory import CURRICULA, create_curriculum

    if task in CURRICULA:
        for at in range(level, -1, -1):
            curriculum = create_curriculum(task)
            for name, attribute in curriculum.attributes.items():
                curriculum.set_attr_level(name, min(at, len(attribute.levels) - 1))
            with contextlib.suppress(AssertionError):  # levels of several attributes that do not go together
                settings = vars(curriculum.generate_configuration({"seed": seed, "size": 1}))
                return reasoning_gym.create_dataset(task, **settings), at
    return reasoning_gym.create_dataset(task, seed=seed, size=1), NO_LEVEL


def draw(task: str, level: int, seed: int) -> tuple[dict[str, Any], int]:
    """(entry: question, answer, metadata; the level it has)."""
    dataset, at = _dataset(task, level, seed)
    return dataset[0], at


def scorer(task: str, level: int, seed: int) -> Callable[[str], float]:
    """What says of an answer what the task thinks of it, 0 to 1. The item is drawn here, so that what takes long
    then is reading the answer."""
    dataset, _ = _dataset(task, level, seed)
    entry = dataset[0]
    return lambda answer: float(dataset.score_answer(answer, entry))


def score_answer(task: str, level: int, seed: int, answer: str) -> float:
    """What the task says of an answer, 0 to 1. For answers that are trusted: nothing bounds it."""
    return scorer(task, level, seed)(answer)
