"""The whole flow at the smallest size that is still real: a recipe, its text, and how to run it."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

from moray.platform.core.cluster import Cluster
from moray.platform.core.events import Event
from moray.platform.core.home import Home
from moray.platform.plan.recipe import parse_recipe
from moray.platform.run.runner import Runner
from moray.platform.run.step_run import RunResult

RECIPE = """
name: small
steps:
  corpus:
    with:
      shard_bytes: 200000
      sources:
        - {{name: code, path: "{folder}/code", include: ["**/*.py"], license: PSF-2.0}}
        - {{name: lines, path: "{folder}/lines", include: ["*.jsonl"], reader: jsonl}}
  filter: {{inputs: {{documents: corpus}}, with: {{min_words: 20}}}}
  dedup: {{inputs: {{documents: filter}}}}
  split: {{inputs: {{documents: dedup}}, with: {{heldout: 0.15}}}}
  tokenizer: {{inputs: {{documents: split}}, with: {{vocab_size: 512}}}}
  tokenize: {{inputs: {{documents: split, tokenizer: tokenizer}}, with: {{sequence_length: 64}}}}
  pretrain:
    inputs: {{tokens: tokenize}}
    with:
      steps: 12
      batch_sequences: 8
      checkpoint: {{every: 4}}
      schedule: {{peak: 3.0e-3}}
      model: {{preset: tiny, hidden_size: 64, intermediate_size: 128, moe_intermediate_size: 32, num_hidden_layers: 3,
              num_nextn_predict_layers: 1,
              kv_lora_rank: 16, q_lora_rank: 24, qk_nope_head_dim: 8, qk_rope_head_dim: 8, v_head_dim: 8}}
  export: {{inputs: {{checkpoint: pretrain, tokenizer: tokenizer}}}}
  evaluate: {{inputs: {{model: export, tokens: tokenize, documents: split}}}}
  register: {{inputs: {{model: export, evaluation: evaluate}}}}
  smoke-serve: {{inputs: {{model: register}}, with: {{max_tokens: 8}}}}
"""

STEPS = [
    "corpus", "filter", "dedup", "split", "tokenizer", "tokenize", "pretrain", "export", "evaluate", "register",
    "smoke-serve",
]  # fmt: skip


def write_text(folder: Path) -> None:
    """The standard library's json, email and logging packages, a copy of one of their files, and some JSON lines."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for package in ("json", "email", "logging"):
        shutil.copytree(stdlib / package, folder / "code" / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(stdlib / "json" / "decoder.py", folder / "code" / "copy.py")
    (folder / "code" / "empty.py").write_text("")
    (folder / "code" / "binary.py").write_bytes(b"\0\1\2")
    (folder / "lines").mkdir()
    rows = [f'{{"text": "{" ".join(f"entry {i} counts {i * k}" for k in range(30))}"}}' for i in range(40)]
    (folder / "lines" / "a.jsonl").write_text("\n".join([*rows, "{torn"]))


def recipe_text(folder: Path, until: str = "smoke-serve") -> str:
    """The recipe over the text in `folder`, up to the step `until`."""
    before, _, after = RECIPE.partition(f"\n  {until}:")
    block = _block(after) if after.startswith("\n") else after.splitlines()[0]
    return f"{before}\n  {until}:{block}\n".format(folder=folder)


def _block(text: str) -> str:
    """The lines of a step's block: those indented deeper than its key."""
    lines = []
    for line in text.splitlines()[1:]:
        if line.strip() and not line.startswith("    "):
            break
        lines.append(line)
    return "\n" + "\n".join(lines)


def run_small(
    home: Home, folder: Path, cluster: Cluster, overrides: tuple[str, ...] = (), until: str = "smoke-serve"
) -> tuple[RunResult, list[Event]]:
    """Runs the recipe up to the step `until`."""
    events: list[Event] = []
    recipe = parse_recipe(recipe_text(folder, until), Path("small.yaml"), overrides)
    return Runner(home, cluster, [events.append]).run(recipe), events
