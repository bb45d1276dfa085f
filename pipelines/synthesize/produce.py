"""Processes one shard of items: reads the finished ones, and generates, verifies and logs the others, item by item.

Runs in a Ray worker. The result of every item is recorded: in the log if it is accepted or rejected, or in the file of
unanswered items if the engine or the budget failed, so that a later run requests it again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from moray.pipelines.shared.shards import Row
from moray.pipelines.synthesize.config import SynthesizeConfig
from moray.pipelines.synthesize.generators.generator import GeneratorContext, ProceduralGenerator
from moray.pipelines.synthesize.generators.open_generator import open_generator
from moray.pipelines.synthesize.items import FinishedItem, Item, Log, item_seed
from moray.pipelines.synthesize.rejection_sampling import RejectionSampling
from moray.pipelines.synthesize.teacher import TeacherClient
from moray.platform.store.paths import AnyPath, write_file

Connect = Callable[[], TeacherClient]


@dataclass(frozen=True)
class WorkDir:
    """The folder with the intermediate files of a run."""

    folder: AnyPath

    def log(self, shard: int) -> Log:
        return Log(self.folder / f"made-{shard:05d}.jsonl")

    def unanswered(self, shard: int) -> AnyPath:
        return self.folder / f"unanswered-{shard:05d}.jsonl"


def produce(shard: Row, config: SynthesizeConfig, work: WorkDir, connect: Connect | None) -> Row:
    """Finishes the items [begin, end) of a generator and counts the results. connect: opens the teacher, if any."""
    generator = config.generators[shard["generator"]]
    documents = dict(enumerate(shard["documents"], shard["begin"]))
    context = GeneratorContext(config.sandbox.limits(), config.unsafe_sandbox, documents)
    maker = open_generator(generator, context)
    log = work.log(shard["shard"])
    done = log.read()
    numbers = [n for n in range(shard["begin"], shard["end"]) if f"{generator.name}/{n}" not in done]
    items = [Item(generator.name, n, item_seed(config.seed, generator.name, n)) for n in numbers]
    unanswered: list[FinishedItem] = []
    if isinstance(maker, ProceduralGenerator):
        for item in items:
            log.add(maker.make(item))
    elif items:
        if connect is None:  # config.py refuses such a recipe
            raise ValueError(f"generator {generator.name!r} needs a teacher")
        unanswered = RejectionSampling(maker, connect(), config, log).run(items)
    log.close()
    lines = "".join(json.dumps(vars(one)) + "\n" for one in unanswered)
    write_file(work.unanswered(shard["shard"]), lines.encode())
    reasons = Counter(made.reason for made in log.read().values())
    return {
        "shard": shard["shard"],
        "before": len(done),
        "accepted": reasons.pop("", 0),
        "rejected": json.dumps(dict(reasons)),
        "rejected_items": sum(reasons.values()),
        "unanswered": json.dumps(Counter(made.reason for made in unanswered)),
    }
