"""What becomes of a teacher's answer, by kind of generator: a document, or a reason why not."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from moray.actors.sandbox.limits import SandboxLimits
from moray.actors.sandbox.run import run_tests
from moray.pipelines.synthesize import chains, prompts
from moray.pipelines.synthesize.config import Maths
from moray.pipelines.synthesize.programs import program_document
from moray.pipelines.synthesize.rows import Item
from moray.pipelines.synthesize.teacher import Answer
from moray.pipelines.synthesize.verify import check_all, full_marks, majority, same_maths

Ask = Callable[[Sequence[tuple[str, int]]], list[Answer]]


@dataclass
class Judgement:
    """reason: '' if it passed. trouble: engine or budget, if a further request of the judge's own failed so."""

    text: str = ""
    reason: str = ""
    detail: str = ""
    verifier: str = ""
    cost: float = 0.0
    trouble: str = ""
    more: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Tools:
    ask: Ask
    limits: SandboxLimits
    unsafe: bool


Pairs = Sequence[tuple[Item, str, int]]  # item, the teacher's answer, its seed


def judge_gym(pairs: Pairs, tools: Tools) -> list[Judgement]:
    """The task's own scorer gives the boxed answer full marks."""
    found = [prompts.boxed(answer) for _, answer, _ in pairs]
    checks = [
        full_marks(item.meta["task"], int(item.meta["level"]), item.seed, answer)
        for (item, _, _), answer in zip(pairs, found, strict=True)
        if answer is not None
    ]
    verdicts = iter(check_all(checks, tools.unsafe))
    judged = []
    for (item, text, _), answer in zip(pairs, found, strict=True):
        if answer is None:
            judged.append(Judgement(text, "form", "no \\boxed{} answer"))
            continue
        verdict = next(verdicts)
        whole = chains.chain_document(str(item.facts["question"]), text.strip(), answer, item.seed)
        reason = "" if verdict.good else "wrong"
        judged.append(Judgement(whole, reason, verdict.detail, "reasoning-gym", more={"answer": answer}))
    return judged


def judge_code(pairs: Pairs, tools: Tools) -> list[Judgement]:
    """Its tests pass in the sandbox."""
    judged = []
    for _, answer, _ in pairs:
        parts = prompts.read_code(answer)
        if parts is None:
            judged.append(Judgement(answer, "form", "not a task and two Python blocks"))
            continue
        verdict = run_tests(parts[1], parts[2], tools.limits, tools.unsafe)
        reason = "" if verdict.passed else f"sandbox:{verdict.outcome}"
        judged.append(Judgement(program_document(*parts), reason, verdict.detail, "sandbox"))
    return judged


def judge_maths(pairs: Pairs, tools: Tools, generator: Maths) -> list[Judgement]:
    """Self-consistency (Wang et al. 2022, arXiv 2203.11171): the solution has the answer that most solutions have."""
    judged = [Judgement(answer, "form", "not a problem and a solution with \\boxed{}") for _, answer, _ in pairs]
    problems = {at: found for at, (_, answer, _) in enumerate(pairs) if (found := prompts.read_problem(answer))}
    asked = [
        (prompts.solve(problem), pairs[at][2] + vote + 1)
        for at, (problem, _) in problems.items()
        for vote in range(generator.votes)
    ]
    answers = tools.ask(asked)
    for place, (at, (problem, solution)) in enumerate(problems.items()):
        own = answers[place * generator.votes : (place + 1) * generator.votes]
        judged[at] = Judgement(f"Problem: {problem}\n\nSolution: {solution}\n", cost=sum(one.cost for one in own))
        judged[at].trouble = next((one.trouble for one in own if one.trouble in ("engine", "budget")), "")
        judged[at].more["votes"] = "\0".join(
            [str(prompts.boxed(solution)), *(vote for one in own if (vote := prompts.boxed(one.text)))]
        )
    _vote([one for one in judged if "votes" in one.more and not one.trouble], tools, generator)
    return judged


def _vote(judged: list[Judgement], tools: Tools, generator: Maths) -> None:
    """Fills in reason and answer, after one batch of checks for all."""
    ballots = [one.more.pop("votes").split("\0") for one in judged]
    places = [list(combinations(range(len(ballot)), 2)) for ballot in ballots]
    checks = [same_maths(ballot[i], ballot[j]) for ballot, own in zip(ballots, places, strict=True) for i, j in own]
    verdicts = iter(check_all(checks, tools.unsafe))
    for one, ballot, own in zip(judged, ballots, places, strict=True):
        equal = [pair for pair in own if next(verdicts).good]
        place, votes = majority(len(ballot), equal)
        share = votes / (1 + generator.votes)
        one.verifier = "math-verify, self-consistency"
        one.more |= {"answer": ballot[place], "agreement": f"{share:.2f}"}
        if (place and (0, place) not in equal) or share < generator.agree:
            one.reason, one.detail = "disagreement", f"{votes} of {1 + generator.votes} have {ballot[place]!r}"


def judge_rephrasing(pairs: Pairs, tools: Tools, min_characters: int) -> list[Judgement]:
    """Long enough, in the form that was asked for, and not the text again. Whether it is true, nothing here knows."""
    judged = []
    for item, answer, _ in pairs:
        text, style = answer.strip(), item.meta["style"]
        detail = ""
        if len(text) < min_characters:
            detail = f"{len(text)} characters"
        elif style == "table" and not re.search(r"^\s*\|?[^|\n]+\|[^\n]*\n\s*\|?\s*:?-{3,}", text, re.MULTILINE):
            detail = "no table"
        elif style == "faq" and "?" not in text:
            detail = "no question"
        elif text in item.facts["text"]:
            detail = "the text again"
        judged.append(Judgement(text + "\n", "form" if detail else "", detail, "form"))
    return judged
