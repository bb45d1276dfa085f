"""What the compiled step's BF16 and INT8 weights cost: held-out bits per byte, and greedy answers.

Every form scores the held-out documents of the model's own token set. Then each continues 32 of them, from their first
64 ids by 64 greedy ids. The answers are compared with those of transformers on the weights as Moray rounds them, where
they may differ only if its two best logits differ by less than 1e-4; and with those of FP32, which counts what rounding
changes.

Usage: python benchmarks/serving_quality.py [MODEL=quickstart@newest]    of at least 2,000 steps of training:
moray run quickstart --set pretrain.steps=2000
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness.heldout import heldout_windows, model_and_training
from harness.result import Bar, report
from harness.rounded import round_weights
from serving_engine import FORMS, PROMPT, agreement, ours, theirs

from moray.models import checkpoint
from moray.models.compiled import CompiledModel
from moray.models.rows import Span
from moray.pipelines.serve.detokenizer import ServingVocabulary
from moray.platform.core.home import Home
from moray.platform.store.artifacts import ArtifactStore

LEAST_STEPS = 2000
BLOCK = 32


def bits(model: CompiledModel, window: Any) -> float:
    """Bits of all tokens of a window but the first."""
    ids = [int(value) for value in window]
    blocks = -(-len(ids) // BLOCK)
    logits = model.forward([Span(ids, 0, range(blocks), len(ids))], model.cache(blocks, BLOCK)).logits_WV[:-1]
    chosen = logits.double().log_softmax(-1).gather(1, torch.tensor(ids[1:]).unsqueeze(1))
    return float(-chosen.sum() / np.log(2))


def main(name: str = "quickstart@newest") -> int:
    torch.set_num_threads(1)
    store = ArtifactStore(Home.from_environment())
    exported, trained = model_and_training(store, name)
    steps = int(trained.manifest.address["config"]["steps"])
    if steps < LEAST_STEPS:
        print(f"error: {name} was trained for {steps} steps\nhint: --set pretrain.steps={LEAST_STEPS}", file=sys.stderr)
        return 2
    vocabulary = ServingVocabulary.load(exported.folder, None, None)
    mine = {form: ours(exported.folder, form, vocabulary) for form in FORMS}
    total, found, prompts = 0, dict.fromkeys(FORMS, 0.0), []
    for number, (windows, size) in enumerate(heldout_windows(store, trained)):
        total += size
        prompts += [window[:PROMPT].tolist() for window in windows[:1] if size and len(window) > PROMPT]
        for form, window in itertools.product(FORMS, windows):
            found[form] += bits(mine[form][1], window)
        if number % 50 == 0:
            print(f"{total:,} bytes", file=sys.stderr, flush=True)
    rows: list[dict[str, Any]] = [
        {"model": name, "steps": steps, "form": form, "bits_per_byte": value / total} for form, value in found.items()
    ]
    answers = {form: run(prompts[:32]).ids for form, (run, _) in mine.items()}
    wrong = dict.fromkeys(FORMS, 0)
    for row in rows:
        form = row["form"]
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(round_weights(checkpoint.load(exported.folder, mtp=False), form), Path(folder) / "model")
            reference, clock = theirs(Path(folder) / "model", "eager", "eager")
            expected = reference(prompts[:32]).ids
        wrong[form], row["near"] = agreement(answers[form], expected, clock.gaps)
        row["different"] = wrong[form]
        row["other_than_fp32"] = sum(a != b for a, b in zip(answers[form], answers["float32"], strict=True))
    bars = [
        Bar(f"{form}: bits per byte over those of FP32", found[form] / found["float32"], 1.001, "lower")
        for form in FORMS[1:]
    ]
    bars.append(Bar("answers that differ where no two ids are near", sum(wrong.values()), 0, "lower"))
    return report("serving_quality", rows, bars)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
