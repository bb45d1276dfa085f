"""A small real run of the whole flow, made once and read by the tests of every contract."""

from __future__ import annotations

import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

from moray.platform.artifacts import Artifact
from moray.platform.events import Event
from moray.platform.home import Home
from moray.platform.recipe import parse_recipe
from moray.platform.runner import Runner, RunResult

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
      checkpoint_every: 4
      schedule: {{peak: 3.0e-3}}
      model: {{preset: tiny, hidden_size: 64, intermediate_size: 128, moe_intermediate_size: 32, num_hidden_layers: 3,
              kv_lora_rank: 16, q_lora_rank: 24, qk_nope_head_dim: 8, qk_rope_head_dim: 8, v_head_dim: 8}}
  export: {{inputs: {{checkpoint: pretrain, tokenizer: tokenizer}}}}
  evaluate: {{inputs: {{model: export, tokens: tokenize, documents: split}}}}
  register: {{inputs: {{model: export, evaluation: evaluate}}}}
  smoke-serve: {{inputs: {{model: register}}, with: {{max_tokens: 8}}}}
"""


@dataclass(frozen=True)
class Flow:
    """A finished run and what is needed to run it again with changes."""

    home: Home
    folder: Path
    result: RunResult
    events: list[Event]
    cluster: object

    def artifact(self, step: str) -> Artifact:
        return self.result.steps[step].artifact

    def run(self, *overrides: str) -> tuple[RunResult, list[Event]]:
        """Runs the recipe again in the same home."""
        return run_small(self.home, self.folder, self.cluster, overrides)


def run_small(
    home: Home, folder: Path, cluster: object, overrides: tuple[str, ...], until: str = "smoke-serve"
) -> tuple[RunResult, list[Event]]:
    """Runs the recipe up to the step `until`."""
    events: list[Event] = []
    before, _, after = RECIPE.partition(f"\n  {until}:")
    text = f"{before}\n  {until}:{after.splitlines()[0]}\n"
    recipe = parse_recipe(text.format(folder=folder), Path("small.yaml"), overrides)
    return Runner(home, cluster, [events.append]).run(recipe), events  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def flow(ray_cluster: object, tmp_path_factory: pytest.TempPathFactory) -> Flow:
    """The standard library's json, email and logging packages, a copy of one of their files, and some JSON lines."""
    folder, home = tmp_path_factory.mktemp("text"), Home(tmp_path_factory.mktemp("home"))
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for package in ("json", "email", "logging"):
        shutil.copytree(stdlib / package, folder / "code" / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(stdlib / "json" / "decoder.py", folder / "code" / "copy.py")
    (folder / "code" / "empty.py").write_text("")
    (folder / "code" / "binary.py").write_bytes(b"\0\1\2")
    (folder / "lines").mkdir()
    rows = [f'{{"text": "{" ".join(f"entry {i} counts {i * k}" for k in range(30))}"}}' for i in range(40)]
    (folder / "lines" / "a.jsonl").write_text("\n".join([*rows, "{torn"]))
    result, events = run_small(home, folder, ray_cluster, ())
    return Flow(home, folder, result, events, ray_cluster)
