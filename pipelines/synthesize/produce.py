"""One shard of items: what is finished is read, the rest is made, verified and logged, item by item.

Runs in a Ray worker. Whatever happens to an item is a row: a reason in its log, or, where the engine or the budget gave
out, a line among the unanswered, so that a later run asks again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moray.actors.sandbox.run import run_tests
from moray.pipelines.shared.documents import read_shard
from moray.pipelines.shared.shards import Row
from moray.pipelines.synthesize import chains, gym, programs, prompts
from moray.pipelines.synthesize.config import (
    Code,
    Gym,
    Maths,
    Programs,
    Rephrase,
    SynthesizeConfig,
    Teacher,
    asks,
)
from moray.pipelines.synthesize.judges import (
    Judgement,
    Pairs,
    Tools,
    judge_code,
    judge_gym,
    judge_maths,
    judge_rephrasing,
)
from moray.pipelines.synthesize.purse import Purse
from moray.pipelines.synthesize.rows import Item, Log, Made, finish, item_seed, reject
from moray.pipelines.synthesize.teacher import AskTeacher
from moray.platform.core.atomic import write_text

Judge = Callable[[Pairs, Tools], list[Judgement]]


@dataclass(frozen=True)
class Room:
    """Where a run works: its folder, the teacher's cache, its purse; threads: requests that one task has under way."""

    folder: Path
    cache: Path
    purse: Purse | None
    threads: int

    def log(self, shard: int) -> Log:
        return Log(self.folder / f"made-{shard:05d}.jsonl")

    def unanswered(self, shard: int) -> Path:
        return self.folder / f"unanswered-{shard:05d}.jsonl"


def produce(shard: Row, config: SynthesizeConfig, room: Room) -> Row:
    """Finishes the items [begin, end) of a generator; counts what became of them."""
    generator = config.generators[shard["generator"]]
    log = room.log(shard["shard"])
    done = log.read()
    before = len(done)
    numbers = [n for n in range(shard["begin"], shard["end"]) if f"{generator.name}/{n}" not in done]
    items = [Item(generator.name, n, item_seed(config.seed, generator.name, n)) for n in numbers]
    unanswered: list[Made] = []
    if items and asks(generator):
        assert config.teacher is not None
        assert room.purse is not None
        unanswered = _teach(items, config, room, log, shard)
    elif items:
        assert isinstance(generator, Gym | Programs)
        one = (
            partial(_task_item, generator) if isinstance(generator, Gym) else partial(_program_item, generator, config)
        )
        for item in items:
            log.add(one(item))
    write_text(room.unanswered(shard["shard"]), "".join(json.dumps(vars(one)) + "\n" for one in unanswered))
    reasons = Counter(made.reason for made in log.read().values())
    return {
        "shard": shard["shard"],
        "before": before,
        "accepted": reasons.pop("", 0),
        "rejected": json.dumps(dict(reasons)),
        "refused": sum(reasons.values()),
        "unanswered": json.dumps(Counter(made.reason for made in unanswered)),
    }


def _task_item(generator: Gym, item: Item) -> Made:
    """A procedural item with the task's own answer, which its scorer must accept."""
    try:
        _draw(generator, item)
        answer, level = item.facts["answer"], int(item.meta["level"])
        good = gym.score_answer(item.meta["task"], level, item.seed, answer) >= 1.0
        worked = chains.steps(item.meta["task"], item.facts["metadata"])
    except Exception as error:  # of somebody's generator: a row, like every trouble of one item
        return reject(item, "generator", f"{type(error).__name__}: {error}")
    text = chains.chain_document(item.facts["question"], worked, answer, item.seed)
    if not good:
        return reject(item, "wrong", f"the task rejects its own answer {answer!r}", text, "reasoning-gym")
    return finish(
        item, text, "reasoning-gym", "full marks", answer=answer, steps=str(worked.count("\n") + bool(worked))
    )


def _draw(generator: Gym, item: Item) -> None:
    """Task by turns, level by how far the generator has come: the curriculum is the order of its documents."""
    tasks = gym.choose_tasks(generator.tasks, generator.solver == "task")
    wanted = generator.levels[item.number * len(generator.levels) // generator.items]
    task = tasks[item.number % len(tasks)]
    entry, level = gym.draw(task, wanted, item.seed)
    item.meta |= {"task": task, "level": str(level)}
    item.facts |= {"question": entry["question"], "answer": entry["answer"], "metadata": entry["metadata"]}


def _program_item(generator: Programs, config: SynthesizeConfig, item: Item) -> Made:
    limits, unsafe = config.sandbox.limits(), config.unsafe_sandbox
    collected = programs.collection()
    place = item.seed % len(collected)
    record = collected[place]
    item.meta |= {"program": f"codeio/{place}"}
    item.facts["question"] = record["task_description"]
    tests, drawn = programs.examples(record, item.seed, generator.examples, limits, unsafe)
    if not tests:
        return reject(item, f"sandbox:{drawn.outcome}", drawn.detail, verifier="sandbox")
    text = programs.program_document(record["task_description"], record["code_sample"], tests)
    found = programs.blocks(text)
    if len(found) != 2:
        return reject(item, "form", "the program holds a fence of its own", text)
    verdict = run_tests(found[0], found[1], limits, unsafe)
    if not verdict.passed:
        return reject(item, f"sandbox:{verdict.outcome}", verdict.detail, text, "sandbox")
    return finish(item, text, "sandbox", "passed")


def _teach(items: list[Item], config: SynthesizeConfig, room: Room, log: Log, shard: Row) -> list[Made]:
    teacher = config.teacher
    assert isinstance(teacher, Teacher)
    assert room.purse is not None
    asker = AskTeacher(teacher, config.budget, room.purse, room.cache, room.threads)
    tools = Tools(asker.ask, config.sandbox.limits(), config.unsafe_sandbox)
    ready, judge = [], _judge(config, shard)
    for item in items:
        try:
            _ask_for(config, shard, item)
            ready.append(item)
        except Exception as error:
            log.add(reject(item, "generator", f"{type(error).__name__}: {error}"))
    return _rounds(ready, judge, tools, config, log)


def _judge(config: SynthesizeConfig, shard: Row) -> Judge:
    generator = config.generators[shard["generator"]]
    if isinstance(generator, Gym):
        return judge_gym
    if isinstance(generator, Maths):
        return partial(judge_maths, generator=generator)
    if isinstance(generator, Rephrase):
        return partial(judge_rephrasing, min_characters=generator.min_characters)
    return judge_code


def _ask_for(config: SynthesizeConfig, shard: Row, item: Item) -> None:
    """Fills in the prompt."""
    generator = config.generators[shard["generator"]]
    assert config.teacher is not None
    item.meta["model"] = config.teacher.model
    if isinstance(generator, Gym):
        _draw(generator, item)
        item.prompt = prompts.solve(item.facts["question"])
    elif isinstance(generator, Maths | Code):
        topic = generator.topics[item.number % len(generator.topics)]
        item.meta["topic"] = topic
        item.prompt = (prompts.write_problem if isinstance(generator, Maths) else prompts.write_code)(topic, item.seed)
    elif isinstance(generator, Rephrase):
        path, row = shard["documents"][item.number - shard["begin"]]
        drawn = read_shard(Path(path), ["id", "text"]).slice(row, 1)
        style = generator.styles[item.number % len(generator.styles)]
        item.meta |= {"style": style, "document": drawn["id"][0].as_py()}
        item.facts["text"] = drawn["text"][0].as_py()
        item.prompt = prompts.rephrase(style, item.facts["text"][: generator.max_characters])


def _rounds(items: list[Item], judge: Judge, tools: Tools, config: SynthesizeConfig, log: Log) -> list[Made]:
    """Rejection sampling: a round is one answer for each item that has none yet that passes, and their verdicts."""
    teacher = config.teacher
    assert teacher is not None
    pending, unanswered = items, []
    tried: dict[str, list[Judgement]] = {item.key: [] for item in items}
    for attempt in range(config.attempts):
        asked = [(item, (item.seed + 1009 * attempt) & 0x7FFFFFFF) for item in pending]
        answers = tools.ask([(item.prompt, seed) for item, seed in asked])
        pairs = []
        for (item, seed), answer in zip(asked, answers, strict=True):
            if answer.trouble == "prompt":
                log.add(reject(item, "prompt", answer.detail, cost=_cost(tried[item.key])))
            elif answer.trouble:
                unanswered.append(reject(item, answer.trouble, answer.detail))
            else:
                pairs.append((item, answer.text, seed, answer.cost))
        verdicts = judge([pair[:3] for pair in pairs], tools)
        pending = []
        for (item, _, seed, cost), judged in zip(pairs, verdicts, strict=True):
            if judged.trouble:
                unanswered.append(reject(item, judged.trouble, "while it was verified"))
                continue
            judged.cost += cost
            judged.more |= {"attempt": str(attempt), "answer_seed": str(seed)}
            tried[item.key].append(judged)
            if (not judged.reason and config.pick == "first") or attempt == config.attempts - 1:
                log.add(_choose(item, tried[item.key]))
            else:
                pending.append(item)
    return unanswered


def _cost(tried: list[Judgement]) -> float:
    return sum(one.cost for one in tried)


def _choose(item: Item, tried: list[Judgement]) -> Made:
    """The shortest answer that passed, else the last one with its reason."""
    passed = sorted((one for one in tried if not one.reason), key=lambda one: len(one.text))
    cost = _cost(tried)
    if not passed:
        last = tried[-1]
        return reject(item, last.reason, last.detail, last.text, last.verifier, cost, **last.more)
    best = passed[0]
    return finish(item, best.text, best.verifier, "passed", cost, **best.more)
